"""Measures a student's file: it is loaded by its own runtime in a child process, and compared with the float student.

The child (`child.py`) imports that runtime alone, so that its memory is what a user's program needs. It gets pixels
batch by batch, so that the memory of both processes is bounded by one batch.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from base import cores
from base.memory import host_memory
from kdcore.data.images import Images
from kdcore.exports.exporter import Deliverable
from kdcore.spec import ExportOptions

log = logging.getLogger("kdcore")

REFERENCE_S = 60.0
"""The most time that the float student takes for the test images. Of more images, evenly spaced ones are measured."""
CHILD_S = 1200.0
"""The time limit of the process that measures one file."""
BATCHES_CHECKED = (1, 2, 3, 7)
"""Batch sizes at which the logits of a float file are compared with PyTorch's, number by number."""
NUMERIC_TOLERANCE = 1e-3
"""The largest difference of a float file's logits, as a share of the largest logit. Measured: up to 1e-5."""
MEMORY_BYTES = 4 << 30
MEMORY_PER_BYTE = 40
"""The child may allocate MEMORY_BYTES, and so many times the size of its file."""
OUT_OF_MEMORY = ("MemoryError", "allocate memory", "AllocateRaw", "bad_alloc")
"""Words of Python, PyTorch, onnxruntime and OpenVINO when there is no more."""
ALLOCATION = ("LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES")
"""What a worker sets for the memory of its engine, and users do not have. (And OpenVINO ends with jemalloc.)"""
SMALLER_BY = 4
"""Where a batch needs too much memory, the next one that is tried has so many times fewer images: each try is a process
that loads the file again."""


class FileFailed(Exception):
    """A file cannot be run by its own runtime."""


class TooMuchMemory(FileFailed):
    """It may be run with fewer images at a time."""


@dataclass(frozen=True)
class Request:
    """What the child is to run."""

    runtime: str
    path: str
    source: str
    """The `student.py` beside the weights."""
    threads: int
    normalizes: bool
    """Whether the file itself normalises pixels in 0..1."""
    mean: list[float]
    std: list[float]
    shape: list[int]
    """Of one image: channels, height, width."""
    batch_sizes: list[int]
    memory_bytes: int
    fused: bool
    """False: onnxruntime runs each operator of the file by itself, in float32."""


@dataclass(frozen=True, eq=False)
class Reference:
    """The float student on the test images, by PyTorch on the CPU."""

    rows: Tensor
    """int64: the rows of the test images that are measured, all but for very slow students."""
    labels: Tensor
    answers: Tensor
    """int64: the class that the student names."""
    first: Tensor
    """Its logits for the first rows, n × K."""

    @property
    def accuracy(self) -> float:
        return _mean(self.answers == self.labels)


@dataclass(frozen=True)
class Measured:
    """One file in figures; see `FileRow`."""

    version: str
    accuracy: float
    agreement: float
    images: int
    latency: list[Mapping[str, float]]
    threads: int
    cpu: str
    peak_memory_bytes: int
    difference: float
    """The largest difference of logits on the first images, as a share of the largest logit."""
    batches_left_out: Sequence[int] = ()


def reference(student: Deliverable, test: Images, size: int) -> Reference:
    """Return the float student's answers, computed once for all files of a deliverable. `size`: of a batch."""
    if "reference" not in student.made:
        student.made["reference"] = _reference(student, test, size)
    found: Reference = student.made["reference"]
    return found


@torch.no_grad()
def _reference(student: Deliverable, test: Images, size: int) -> Reference:
    run, images = _plain(student), test.at(None)
    rows = torch.arange(len(images))
    began = time.monotonic()
    run(_pixels(images, rows[:size]))
    most = int(REFERENCE_S / max(time.monotonic() - began, 1e-9)) * min(size, len(rows))
    if most < len(rows):
        rows = torch.linspace(0, len(rows) - 1, max(most, size)).round().long()
    first = run(_pixels(images, rows[: sum(BATCHES_CHECKED)]))
    answers = torch.cat([run(_pixels(images, part)).argmax(1) for part in torch.split(rows, size)])
    return Reference(rows, images.labels.cpu()[rows], answers, first)


def _plain(student: Deliverable) -> Any:
    network: nn.Module = student.network
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (student.mean, student.std))
    return lambda pixels: network((pixels.float() / 255 - mean) / std)


def _pixels(images: Images, rows: Tensor) -> Tensor:
    return images.pixels.index_select(0, rows).cpu().contiguous()


def _mean(each: Tensor) -> float:
    return float(each.double().mean())


def measure(
    runtime: str,
    path: Path,
    source: Path,
    student: Deliverable,
    options: ExportOptions,
    test: Images,
    working: Callable[[int, int], None] | None = None,
    *,
    fused: bool = True,
) -> Measured:
    """Run a file on the test images in a child process. `source`: the student's `student.py`. `working` is called with
    done and total from time to time. Where a batch of `options.batch_size` needs more memory than a measurement may
    take, a smaller one is measured in its place. `fused`: as users run it; False: an int8 file in sums that cannot
    overflow (see `int8_overflows`). Raises FileFailed."""
    size, left_out = options.batch_size, list[int]()
    while True:
        try:
            found = _measured(runtime, path, source, student, options, test, size, working, fused)
            return replace(found, batches_left_out=left_out)
        except TooMuchMemory:
            if size == 1:
                raise
            left_out.append(size)
            size = max(1, size // SMALLER_BY)
            log.info("%s: too little memory for %d images at a time; trying %d", path.name, left_out[-1], size)


def _measured(
    runtime: str,
    path: Path,
    source: Path,
    student: Deliverable,
    options: ExportOptions,
    test: Images,
    size: int,
    working: Callable[[int, int], None] | None,
    fused: bool,
) -> Measured:
    """Run a file in one child process, with at most `size` images at a time. Raises FileFailed."""
    expected, threads = reference(student, test, options.batch_size), torch.get_num_threads()
    request = Request(
        runtime=runtime,
        path=str(path.absolute()),
        source=str(source.absolute()),
        threads=threads,
        normalizes=options.normalization == "inside",
        mean=list(student.mean),
        std=list(student.std),
        shape=[student.channels, *student.image_size],
        batch_sizes=sorted({1, size}),
        memory_bytes=min(MEMORY_BYTES + MEMORY_PER_BYTE * path.stat().st_size, host_memory() or 1 << 62),
        fused=fused,
    )
    images, classes, rows = test.at(None), len(student.class_names), expected.rows
    with _child(request) as child:
        found = child.begin()
        small = rows[: sum(BATCHES_CHECKED)]
        checks = torch.split(small, _sizes(len(small), size))
        first = torch.cat([child.logits(_pixels(images, part), classes) for part in checks])
        answers = []
        for part in torch.split(rows, size):
            answers.append(child.logits(_pixels(images, part), classes).argmax(1))
            if working is not None:
                working(len(answers), -(-len(rows) // size))
    answered = torch.cat(answers)
    scale = max(float(expected.first.abs().max()), 1e-6)
    return Measured(
        version=found["version"],
        accuracy=_mean(answered == expected.labels),
        agreement=_mean(answered == expected.answers),
        images=len(rows),
        latency=found["latency"],
        threads=threads,
        cpu=cpu_name(),
        peak_memory_bytes=found["peak_memory_bytes"],
        difference=float((first - expected.first).abs().max()) / scale,
    )


def int8_overflows() -> bool:
    """Return True where onnxruntime adds products of 8 bits in 16 bits, in which a sum of two can overflow: on x86 CPUs
    without VNNI. Those with VNNI or AMX, and ARM, add them in 32 bits."""
    return platform.machine() in ("x86_64", "AMD64") and not cores.flags() & {"avx512_vnni", "avx_vnni", "amx_int8"}


def _sizes(count: int, most: int) -> list[int]:
    """Return the sizes of batches of so many images together: BATCHES_CHECKED, as far as they have at most `most`."""
    sizes: list[int] = []
    for size in BATCHES_CHECKED:
        left = min(size, count - sum(sizes))
        while left > 0:
            sizes.append(min(left, most))
            left -= sizes[-1]
    return sizes


class _Child:
    """The parent's end of a child process."""

    def __init__(self, process: subprocess.Popen[bytes], noise: IO[bytes], request: Request) -> None:
        self._process, self._noise, self._request = process, noise, request

    def begin(self) -> dict[str, Any]:
        line = self._to_read().readline()
        if not line:
            raise self._failed()
        found: dict[str, Any] = json.loads(line)
        return found

    def logits(self, pixels: Tensor, classes: int) -> Tensor:
        """Return the logits of a batch: float32 N × K."""
        size = 4 * len(pixels) * classes
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(len(pixels).to_bytes(4, "little") + pixels.numpy().tobytes())
            self._process.stdin.flush()
            answer = bytearray(self._to_read().read(size))
        except BrokenPipeError:
            raise self._failed() from None
        if len(answer) < size:
            raise self._failed()
        return torch.frombuffer(answer, dtype=torch.float32).view(len(pixels), classes)

    def _to_read(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _failed(self) -> FileFailed:
        code = self._process.wait()
        self._noise.seek(0)
        text = self._noise.read().decode(errors="replace").strip()
        log.warning("the process that measures a file ended with code %d:\n%s", code, text)
        last = (text.splitlines() or [f"its process ended with code {code}"])[-1]
        if any(words in last for words in OUT_OF_MEMORY):
            bytes_, images = self._request.memory_bytes, max(self._request.batch_sizes)
            each = f"{images} image{'s' * (images > 1)} at a time"
            return TooMuchMemory(
                f"it needs more memory than the {bytes_ / 1e9:.1f} GB that a measurement may take, with {each}"
            )
        folder = Path(self._request.path).parent
        return FileFailed(last.replace(f"{folder}/", "")[:300])


@contextmanager
def _child(request: Request) -> Iterator[_Child]:
    """Yield a child process that runs a file, and end it afterwards."""
    program = Path(__file__).with_name("child.py")
    # Without -P, this folder would be searched for modules first, and some have the names of libraries. With -B, no
    # bytecode of student.py is left beside it.
    command = [sys.executable, "-PB", str(program), json.dumps(asdict(request))]
    with tempfile.TemporaryFile() as noise:
        environment = {name: value for name, value in os.environ.items() if name not in ALLOCATION}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, env=environment
        )
        limit = threading.Timer(CHILD_S, process.kill)
        limit.daemon = True
        limit.start()
        try:
            with process:
                try:
                    yield _Child(process, noise, request)
                except BaseException:
                    process.kill()
                    with suppress(OSError):  # What it has not read cannot be sent any more.
                        process.communicate()
                    raise
        finally:
            limit.cancel()


def cpu_name() -> str:
    """Return the model of this host's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "") or platform.processor() or platform.machine()
