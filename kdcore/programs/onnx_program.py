"""An ONNX file as a classifier's network, run by onnxruntime, an optional library.

onnxruntime computes on the CPU, or on the GPU of the job if its build for GPUs is installed. It runs with as many
threads as PyTorch, and always with the same number of images at a time: the batch that the file was exported for, or
`PIECE`. A smaller rest is filled up with zeros. So all shapes are the same for every batch, and the outputs for an
image do not depend on how many images come with it.

Shapes: N batch, C channels, H × W pixels, K classes.
"""

import importlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base.errors import EngineError, OutOfMemory, TeacherMismatch
from base.files import sha256_of
from kdcore.catalog.facts import ProgramFacts
from kdcore.programs import onnx_file
from kdcore.programs.program import Program

PIECE = {"cpu": 8, "cuda": 64}
"""Images at a time, by the kind of device, for a file that takes any batch."""
VALUES = 2**24
"""The most numbers of one image (a colour image of 2,364 x 2,364), and of the outputs for it."""
PIECE_VALUES = 2**28
"""The most numbers of all images of a fixed batch: 1 GiB."""
ONE_TENSOR = "export a network that takes one float tensor of images, N x C x H x W, and returns one of logits, N x K"
DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
CHANNELS = (1, 3)


NOISE = re.compile(
    r"^\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from the file failed:|(This is an i|I)nvalid model\. ?"
    r"|/\S+\.(cc|h):\d+ [^\n]*?\) (?=\S)"
)
"""Parts of onnxruntime's messages that say nothing about the file: places in its source, signatures of functions."""
NO_MEMORY = re.compile(r"[Ff]ailed to allocate memory|bad_alloc|bad allocation|Available memory of")
INSTALL = (
    "Where the service and its workers run: pip install onnx 'onnxruntime<1.29' (the extra `onnx` of this project)"
)


class OnnxruntimeMissing(TeacherMismatch):
    """An ONNX file cannot be read here, but can be as soon as the extra is installed: the refusal is not remembered."""

    retryable = True


class RunFailed(TeacherMismatch):
    """onnxruntime can read a file, and fails on images of this size."""


@dataclass(frozen=True)
class Plan:
    """How images are given to the graph."""

    images: str
    """The input's name."""
    logits: str
    """The output's name."""
    dtype: type[np.floating[Any]]
    channels_last: bool
    batch: int | None
    """The number of images at a time; None if the file takes any."""


class OnnxProgram(Program):
    """A program of onnxruntime. Its weights are not PyTorch's: the module has no parameters and moves nowhere; it
    computes on the device of its images."""

    eval_first = "export the network in eval mode: torch.onnx.export(model.eval(), ...)"
    holds_tensors = False

    def __init__(self, facts: ProgramFacts, path: Path, plan: Plan, session: Any) -> None:
        super().__init__(facts)
        self._path, self._plan = path, plan
        self._sessions = {"cpu": session}

    @torch.no_grad()
    def outputs(self, images_NCHW: Tensor) -> Tensor:
        plan, kind = self._plan, images_NCHW.device.type
        images = images_NCHW.detach().float()
        images = images.permute(0, 2, 3, 1) if plan.channels_last else images
        given = np.ascontiguousarray(images.cpu().numpy(), dtype=plan.dtype)
        if kind not in self._sessions:
            self._sessions[kind] = _session(self._path, kind) if _has_gpu() else self._sessions["cpu"]
        size = plan.batch or PIECE.get(kind, PIECE["cpu"])
        outputs = np.empty((len(given), self.facts.num_classes), np.float32)
        for at in range(0, len(given), size):
            part = given[at : at + size]
            filled = np.zeros((size, *given.shape[1:]), given.dtype)
            filled[: len(part)] = part
            with _running("run"):
                [answer] = self._sessions[kind].run([plan.logits], {plan.images: filled})
            if answer.shape != (size, self.facts.num_classes):
                self.wrong_shape(size, answer.shape)
            outputs[at : at + size] = answer[: len(part)]
        return torch.from_numpy(outputs).to(images_NCHW.device)


def open_onnx(path: Path) -> OnnxProgram:
    """Read an ONNX file. Raises TeacherMismatch if it cannot be a teacher, OnnxruntimeMissing without the extra."""
    _require_libraries()
    contents = onnx_file.look_through(path)
    session = _session(path, "cpu")
    with _running("read", path):
        plan, channels, image_size, classes = _signature(session)
    facts = ProgramFacts(
        format="onnx",
        num_classes=classes,
        channels=channels,
        parameters=contents.parameters,
        bytes=path.stat().st_size,
        digest=f"sha256:{sha256_of(path)}",
        image_size=image_size,
        batch=plan.batch or "any",
    )
    return OnnxProgram(facts, path, plan, session)


def _require_libraries() -> None:
    for name in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise OnnxruntimeMissing(
                f"the file is an ONNX model, and {name}, which reads it, is not installed here", hint=INSTALL
            ) from error


def _session(path: Path, device: str) -> Any:
    """Return onnxruntime's session of a file that was looked through. Raises TeacherMismatch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    # Threads that wait for work would take the cores from PyTorch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Only these: onnxruntime offers one that computes elsewhere.
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    with _running("read", path):
        # Its fallback would try the same once more, and print that.
        return onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)


def _has_gpu() -> bool:
    """Return True if this build of onnxruntime computes on GPUs, too."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@contextmanager
def _running(verb: str, path: Path | None = None) -> Iterator[None]:
    """Turn onnxruntime's errors into TeacherMismatch, without the path of the file; or OutOfMemory."""
    try:
        yield
    except (EngineError, MemoryError):
        raise
    except Exception as error:  # onnxruntime's own errors have no common class but this.
        words = str(error)
        if NO_MEMORY.search(words):
            raise OutOfMemory(
                "onnxruntime cannot get the memory that the ONNX file asks for",
                hint="networks for such images need less: look for a shape in its graph that is too large",
            ) from error
        if path is not None:
            words = words.replace(str(path), "the file")
        words = NOISE.sub("", words).strip() or type(error).__name__
        hint = "export it with an older set of operators: opset_version=17" if "pset" in words else onnx_file.EXPORT
        kind = RunFailed if verb == "run" else TeacherMismatch
        raise kind(f"onnxruntime cannot {verb} the ONNX file: {words.splitlines()[0][:500]}", hint) from error


def _signature(session: Any) -> tuple[Plan, int, tuple[int | None, int | None], int]:
    """Return how images are given, their channels and size, and the number of classes.

    Raises TeacherMismatch unless the graph takes a batch of images and returns one of logits.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        names = f"{_named(inputs)} and returns {_named(outputs)}"
        raise TeacherMismatch(f"the ONNX file takes {names}; a teacher has one of each", hint=ONE_TENSOR)
    images, logits = inputs[0], outputs[0]
    if images.type not in DTYPES or len(images.shape) != 4:
        raise TeacherMismatch(f"the ONNX file takes {_described(images)}, not images", hint=ONE_TENSOR)
    batch, *sides = map(_size, images.shape)
    channels_last = sides[0] not in CHANNELS and sides[2] in CHANNELS
    height, width, channels = sides if channels_last else (*sides[1:], sides[0])
    if channels is None:
        raise TeacherMismatch(
            f"the ONNX file takes {_described(images)}: the number of channels must be known",
            hint="leave only batch, height and width open in the export",
        )
    if logits.type not in DTYPES or len(logits.shape) != 2 or _size(logits.shape[1]) is None:
        raise TeacherMismatch(
            f"the ONNX file returns {_described(logits)}, not a known number of logits for each image", hint=ONE_TENSOR
        )
    classes = _size(logits.shape[1]) or 0
    _refuse_sizes(images, (channels, height, width), batch)
    if classes > VALUES:
        raise TeacherMismatch(f"the ONNX file returns {_described(logits)}", hint=ONE_TENSOR)
    plan = Plan(images.name, logits.name, DTYPES[images.type], channels_last, batch)
    return plan, channels, (height, width), classes


def _refuse_sizes(images: Any, image: Sequence[int | None], batch: int | None) -> None:
    if 0 in (*image, batch):
        raise TeacherMismatch(f"the ONNX file takes {_described(images)}: no images", hint=ONE_TENSOR)
    values = math.prod(side or 1 for side in image)
    if values > VALUES or values * (batch or 1) > PIECE_VALUES:
        raise TeacherMismatch(
            f"the ONNX file takes {_described(images)}; an image has at most {VALUES:,} numbers, a fixed batch "
            f"{PIECE_VALUES:,}",
            hint="export it for smaller images or batches",
        )


def _size(side: int | str | None) -> int | None:
    """Return a size; None if it may vary, which files say by a name, by nothing, or by -1."""
    return side if isinstance(side, int) and side >= 0 else None


def _described(one: Any) -> str:
    """Return the type and shape of an input or output, such as `float N x 3 x 32 x 32`."""
    kind = str(one.type).removeprefix("tensor(").removesuffix(")")
    return f"{kind} {' x '.join(str('?' if side is None else side)[:20] for side in one.shape) or 'of one number'}"


def _named(several: Sequence[Any]) -> str:
    names = ", ".join(one.name[:40] for one in several[:4])
    return f"{len(several)} ({names}{', …' if len(several) > 4 else ''})"
