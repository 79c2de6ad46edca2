"""What a job ships beside its weights: files of its student, documents; and how int8 is trained and measured."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from base.errors import Fault
from kdcore.spec.vocabulary import Vocabulary, at_most

ExportFormat = Literal["safetensors", "onnx", "onnx_int8", "torch_export", "openvino"]
INT8: tuple[ExportFormat, ...] = ("onnx_int8",)
"""Formats whose weights and activations are 8-bit integers."""
_ONNX = ("onnx", "onnxscript", "onnxruntime")
LIBRARIES: Mapping[ExportFormat, tuple[str, ...]] = {
    "safetensors": (),
    "onnx": _ONNX,
    "onnx_int8": _ONNX,
    "torch_export": (),
    "openvino": (*_ONNX, "openvino"),
}
"""Packages that a format needs beside torch: those that write its file, and those that run it. All are in extras."""


def missing(name: ExportFormat) -> list[str]:
    """Return the packages that a format needs and that are not installed here."""
    return [package for package in LIBRARIES[name] if find_spec(package) is None]


def not_installed(formats: Sequence[ExportFormat]) -> Iterator[Fault]:
    """Yield the faults of formats whose packages are not installed here, where the workers have the same ones."""
    for number, name in enumerate(formats):
        if absent := missing(name):
            extras = ",".join(sorted({"openvino" if package == "openvino" else "onnx" for package in absent}))
            text = f"{name!r} needs {' and '.join(absent)}, not installed here: pip install 'distillery[{extras}]'"
            yield Fault(f"/export/{number}", text, "not_allowed", [one for one in LIBRARIES if not missing(one)], name)


Document = Literal["html", "model_card", "tensorboard"]


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"each name once; {', '.join(twice)} is there twice")
    return names


def _single_as_list(given: object) -> object:
    return [given] if isinstance(given, str) else given


Formats = Annotated[
    tuple[ExportFormat, ...],
    Field(min_length=1, max_length=8),
    at_most(8),
    BeforeValidator(_single_as_list),
    AfterValidator(_each_once),
]
Documents = Annotated[
    tuple[Document, ...], Field(max_length=8), at_most(8), BeforeValidator(_single_as_list), AfterValidator(_each_once)
]


class ExportOptions(Vocabulary):
    """How files of a student are made and measured."""

    normalization: Literal["outside", "inside"] = Field(
        default="outside",
        description="inside: the file takes pixels in 0..1 and has the student's mean and std as its first operation. "
        "outside: the file takes normalised images, as the network does. Safetensors has no operations.",
    )
    tolerance: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="The most that a file's accuracy on the test images may be below that of the student, as a "
        "fraction. A file that is worse is refused: the job succeeds without it, with a warning.",
    )
    calibration_images: int = Field(
        default=512,
        ge=16,
        le=100_000,
        description="Training images, without augmentation, from which the ranges of int8 activations are taken.",
    )
    measure: bool = Field(
        default=True,
        description="True: each file is loaded by its own runtime, in a process of its own, and measured on the test "
        "images; what does not compute the student is refused. False: files are written and not looked at again.",
    )
    batch_size: int = Field(
        default=32,
        ge=2,
        le=1024,
        description="The latency is measured with one image, and with so many; with fewer where these need too much "
        "memory.",
    )


class Quantization(Vocabulary):
    """Training for int8: the last epochs see the rounding of weights and activations."""

    aware: bool = Field(
        default=True,
        description="True: the last epochs train with fake quantisation, under the same teacher (Jacob et al., "
        "CVPR 2018, arXiv:1712.05877). False: as without the object.",
    )
    epochs: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="The last epochs, within training.epochs. Default: a tenth of them, at least 1.",
    )


def default_aware_epochs(epochs: int) -> int:
    """Return how many of a training's epochs train for int8 by default: a tenth (ModelOpt and Ultralytics take 5 to
    10 %)."""
    return max(1, round(epochs / 10))
