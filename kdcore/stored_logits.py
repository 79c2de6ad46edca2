"""A teacher of which only the logits are known: an .npz with a row for each training image, in the place of a network.

    logits        float16 or float32, training images x classes; or views x training images x classes
    views         integers, one for each view, if there are several: its number in `data/views.py`
    test_logits   test images x classes, of any of the two types; optional
    labels        integers, one for each training image; optional, and compared with the data's
    test_labels   the same of the test images

Nothing in the file is unpickled. It is read in chunks, and `logits` alone is kept, in the type of the file.

Shapes: V views, N training images, M test images, K classes.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib import format as npy
from torch import Tensor, nn

from base.errors import TeacherMismatch
from base.files import sha256_of
from base.zip_files import members
from kdcore.catalog.facts import LogitsFacts
from kdcore.classifier import Classifier
from kdcore.data.archive import LIMITS
from kdcore.data.images import Data
from kdcore.lesson import NOTHING, Batch, Needs, Teacher, View

MOST_BYTES = 4 << 30
"""The largest array of logits. It is kept in memory: CIFAR-100 with all 162 views has 1.6 GB in float16."""
MOST_VIEWS = 2 * 129**2
"""Those of crop_flip with the largest padding."""
_MOST_ARRAYS = 100
_CHUNK_BYTES = 16 << 20
_READING_FAILED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError),
    *(ValueError, SyntaxError, TypeError, OverflowError, tokenize.TokenError),
)
_NAMES = ("logits", "views", "test_logits", "labels", "test_labels")
_EXAMPLE = "numpy.savez('teacher.npz', logits=logits.astype('float16'))"


@dataclass(frozen=True)
class _Array:
    """The header of an array in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    order: Literal["C", "F"]
    """F: Fortran's, which numpy gives to `logits[:, columns]`."""


@dataclass(frozen=True)
class LogitsFile:
    """A file of logits whose shapes and numbers of views have been checked."""

    facts: LogitsFacts
    path: Path


def inspect(path: Path) -> LogitsFacts:
    """Return the facts of a file after reading every number. Raises TeacherMismatch if it cannot be a teacher."""
    with _opened(path) as archive:
        arrays = _headers(archive)
        for name in ("logits", "test_logits"):
            for start, values in _chunks(archive, arrays[name]) if name in arrays else ():
                _require_finite(arrays[name], start, values)
    return open_logits(path).facts


def open_logits(path: Path) -> LogitsFile:
    """Read the headers of a file, and the numbers of its views. Raises TeacherMismatch."""
    with _opened(path) as archive:
        arrays = _headers(archive)
        logits, test = arrays["logits"], arrays.get("test_logits")
        if "views" in arrays:
            _places(archive, arrays["views"])
    facts = LogitsFacts(
        num_classes=logits.shape[-1],
        bytes=path.stat().st_size,
        train=logits.shape[-2],
        test=test.shape[0] if test is not None else None,
        views=logits.shape[0] if "views" in arrays else None,
        labels="labels" in arrays or "test_labels" in arrays,
        digest=f"sha256:{sha256_of(path)}",
    )
    return LogitsFile(facts, path)


class StoredLogits(nn.Module, Teacher):
    """A teacher that looks its logits up by row and number of the view. It has no network."""

    logits: Tensor
    places: Tensor
    test: Tensor | None

    def __init__(self, file: LogitsFile, data: Data) -> None:
        """Read the logits. Raises TeacherMismatch if a number is not finite, or if labels are not the data's."""
        super().__init__()
        self.members: Sequence[Classifier] = []
        self.facts = file.facts
        with _opened(file.path) as archive:
            arrays = _headers(archive)
            logits = _whole(archive, arrays["logits"])
            test = _whole(archive, arrays["test_logits"]) if "test_logits" in arrays else None
            places = _places(archive, arrays["views"]) if "views" in arrays else np.zeros(1, dtype=np.int64)
            for name, own in (("labels", data.train.labels), ("test_labels", data.test.labels)):
                if name in arrays:
                    _require_labels(archive, arrays[name], own)
        self.register_buffer("logits", logits.view(-1, *logits.shape[-2:]), persistent=False)
        self.register_buffer("places", torch.from_numpy(places), persistent=False)
        self.register_buffer("test", test, persistent=False)

    def show(self, needs: Needs) -> None:
        assert needs == NOTHING, "rules refuse logits alone where more is compared"

    def forward(self, batch: Batch) -> View:
        assert batch.view_ids is not None, "fit() refuses views without numbers"
        return View(self.logits[self.places[batch.view_ids], batch.index].float())

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return the logits of training images as they are, without augmentation: n × K, float32 on the CPU."""
        place = self.places[self.facts.plain_view]
        return self.logits[place, rows.to(self.logits.device)].float().cpu()

    def of_test_images(self) -> Tensor | None:
        """Return the logits of all test images: M × K, float32 on the CPU; None if the file has none."""
        return None if self.test is None else self.test.float().cpu()

    def combined(self, logits_kNK: Sequence[Tensor]) -> Tensor:
        (logits_NK,) = logits_kNK
        return logits_NK

    def soft_targets(self, logits_kNK: Sequence[Tensor], temperature: float) -> Tensor:
        return (self.combined(logits_kNK) / temperature).softmax(1)


# The file


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the file. Raises TeacherMismatch for too many arrays, before Python's reader makes an object for each, and
    for numbers that were packed as only zeros are."""
    with _reading():
        with path.open("rb") as file:
            found = list(islice(members(file.fileno()), _MOST_ARRAYS + 1))
        if len(found) > _MOST_ARRAYS:
            raise TeacherMismatch(f"the file holds more than {_MOST_ARRAYS} arrays", hint=_EXAMPLE)
        size = sum(one.file_size for one in found)
        if size > max(LIMITS.ratio_from_bytes, LIMITS.ratio * path.stat().st_size):
            text = f"the file unpacks to more than {LIMITS.ratio} times its size: it looks like a bomb"
            raise TeacherMismatch(text, hint=_EXAMPLE)
        with zipfile.ZipFile(path) as archive:
            yield archive


@contextmanager
def _reading() -> Iterator[None]:
    """Turn every error of zip, deflate and numpy into TeacherMismatch."""
    try:
        yield
    except _READING_FAILED as error:
        text = f"the file of logits cannot be read: {error}"
        raise TeacherMismatch(text, hint=f"write it again: {_EXAMPLE}") from error


def _headers(archive: zipfile.ZipFile) -> Mapping[str, _Array]:
    """Return the arrays of the file by name, with shapes that go together."""
    stored = sorted(archive.namelist())
    present = [name for name in _NAMES if f"{name}.npy" in stored]
    unknown = [name.removesuffix(".npy") for name in stored if name.removesuffix(".npy") not in present]
    if "logits" not in present or unknown:
        what = f"an array {unknown[0]!r}, which is not read" if "logits" in present else "no array logits"
        raise TeacherMismatch(
            f"the file has {what}; it holds {', '.join(stored[:10]) or 'nothing'}",
            hint=f"{_EXAMPLE}; beside it views, test_logits, labels and test_labels are read",
        )
    arrays = {name: _header(archive, name) for name in present}
    logits = arrays["logits"]
    several = "views" in arrays
    if len(logits.shape) != (3 if several else 2):
        wanted = "views x training images x classes" if several else "training images x classes"
        hint = "several views need the array views, their numbers" if len(logits.shape) == 3 else _EXAMPLE
        raise TeacherMismatch(f"logits has shape {logits.shape}, and is {wanted}", hint=hint)
    test = arrays.get("test_logits")
    if test is not None and (len(test.shape) != 2 or test.shape[1] != logits.shape[-1]):
        text = f"test_logits has shape {test.shape}, and is test images x classes, of which logits has"
        raise TeacherMismatch(f"{text} {logits.shape[-1]}", hint="send the same classes in both")
    counts = {"views": logits.shape[0], "labels": logits.shape[-2], "test_labels": test.shape[0] if test else None}
    for name, count in counts.items():
        if name in arrays and count is not None and arrays[name].shape != (count,):
            text = f"{name} has shape {arrays[name].shape}, and is one number for each of {count}"
            raise TeacherMismatch(text, hint=f"{name}.reshape(-1), if only the shape is wrong")
    if several and logits.shape[0] > MOST_VIEWS:
        text = f"{logits.shape[0]} views; crop_flip has {MOST_VIEWS} at most"
        raise TeacherMismatch(text, hint="logits is views x training images x classes")
    return arrays


def _header(archive: zipfile.ZipFile, name: str) -> _Array:
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        array = _read_header(file, name)
        start = file.tell()
    kinds, wanted = ("f", "float16 or float32") if name.endswith("logits") else ("iu", "integers")
    if array.dtype.kind not in kinds or (kinds == "f" and array.dtype not in (np.float16, np.float32)):
        line = f"{name}.astype('{'float32' if kinds == 'f' else 'int64'}')"
        raise TeacherMismatch(f"{name} is {array.dtype}, and must be {wanted}", hint=line)
    size = math.prod(array.shape) * array.dtype.itemsize
    if not size:
        raise TeacherMismatch(f"{name} is empty: its shape is {array.shape}", hint=_EXAMPLE)
    if size > MOST_BYTES:
        text = f"{name} has {size:,} bytes; the most is {MOST_BYTES:,}"
        raise TeacherMismatch(text, hint="send float16, fewer views (a smaller padding), or no views")
    if member.file_size != start + size:
        text = f"{name} is cut short: its shape is {array.shape}, but it has {member.file_size - start} bytes"
        raise TeacherMismatch(text, hint=f"write it again: {_EXAMPLE}")
    return array


def _read_header(file: IO[bytes], name: str) -> _Array:
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if any(type(side) is not int or side < 0 for side in shape):
        raise TeacherMismatch(f"{name} has the shape {shape}, which no array has", hint=_EXAMPLE)
    if dtype.hasobject:
        text = f"{name} holds Python objects, which are never unpickled"
        raise TeacherMismatch(text, hint="store plain numbers: numpy.array(rows, dtype='float32')")
    return _Array(name, shape, dtype, "F" if fortran_order else "C")


def _chunks(archive: zipfile.ZipFile, array: _Array) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """Yield the numbers of an array in the file's order, flat and a few at a time, each with the place of the first."""
    total, most = math.prod(array.shape), _CHUNK_BYTES // array.dtype.itemsize
    with archive.open(f"{array.name}.npy") as file:
        _read_header(file, array.name)
        for start in range(0, total, most):
            count = min(most, total - start)
            yield start, np.frombuffer(file.read(count * array.dtype.itemsize), dtype=array.dtype, count=count)


def _require_finite(array: _Array, start: int, values: npt.NDArray[np.generic]) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        place = np.unravel_index(start + int(np.argmin(finite)), array.shape, order=array.order)
        text = f"{array.name}{[int(at) for at in place]} is {values[np.argmin(finite)]}, and must be a finite number"
        raise TeacherMismatch(text, hint="in float16 numbers above 65504 are infinite: send float32, or smaller logits")


def _whole(archive: zipfile.ZipFile, array: _Array) -> Tensor:
    """Return an array of finite numbers, in the type of the file."""
    values = np.empty(math.prod(array.shape), dtype=array.dtype.newbyteorder("="))
    for start, chunk in _chunks(archive, array):
        _require_finite(array, start, chunk)
        values[start : start + len(chunk)] = chunk
    return torch.from_numpy(np.ascontiguousarray(values.reshape(array.shape, order=array.order)))


def _places(archive: zipfile.ZipFile, views: _Array) -> npt.NDArray[np.int64]:
    """Return the place in the file of each view, by its number."""
    numbers = np.concatenate([chunk for _, chunk in _chunks(archive, views)])
    count = len(numbers)
    missing = sorted(set(range(count)) - set(numbers.tolist()))
    if missing:
        raise TeacherMismatch(
            f"views are {count} numbers, and view {missing[0]} is not among them",
            hint=f"all views of an augmentation are needed, each once, in any order: 0 to {count - 1}",
        )
    return np.argsort(numbers.astype(np.int64))


def _require_labels(archive: zipfile.ZipFile, array: _Array, own_n: Tensor) -> None:
    """Raise TeacherMismatch if labels differ from the data's: then the rows are in another order."""
    own = own_n.cpu().numpy()
    for start, chunk in _chunks(archive, array):
        other = np.flatnonzero(chunk.astype(np.int64) != own[start : start + len(chunk)])
        if len(other):
            row = start + int(other[0])
            raise TeacherMismatch(
                f"{array.name}[{row}] is {chunk[other[0]]}, and the label of that image is {own[row]}: "
                f"{len(other)} or more rows are in another order than the data set's, or its classes are",
                hint="python -m kdcore images FILE.safetensors --dataset … --split train writes the images in order",
            )
