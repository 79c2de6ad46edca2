"""Arrays in one `.npz` file: x_train, y_train, x_test, y_test, and class_names if there are any. A file of x alone (or
of x_train) holds images without labels.

Other usual names are read as these (`NAMES`). Images are uint8, N × H × W × C, N × C × H × W (C is 1 or 3) or N × H ×
W; another order of the axes is refused with the line that changes it. Labels are integers from 0. Without x_test and
y_test, a tenth of the training images is set aside. Nothing in the file is ever unpickled, and images are read in
chunks, so a file may be larger than memory.
"""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import Image

from base.errors import DatasetUnreadable
from kdcore.data import image_files
from kdcore.data.archive import LIMITS
from kdcore.data.decoding import Piece, Pixels, Source, Split, carve, no_labels, require_all_classes
from kdcore.data.images import Labels

_CHUNK_BYTES = 16 << 20
_SMALL_BYTES = 256 << 20
_READING_FAILED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError),
    *(ValueError, SyntaxError, tokenize.TokenError),
)
_FLOAT_HINT = "Store bytes: for floats in 0..1, (x * 255).round().astype('uint8')."


NAMES: dict[str, tuple[str, ...]] = {
    "x_train": ("x_train", "X_train", "train_images", "train_x", "train_X", "train_data", "images_train"),
    "y_train": ("y_train", "Y_train", "train_labels", "train_y", "train_Y", "labels_train"),
    "x_test": ("x_test", "X_test", "test_images", "test_x", "test_X", "test_data", "images_test"),
    "y_test": ("y_test", "Y_test", "test_labels", "test_y", "test_Y", "labels_test"),
    "class_names": ("class_names", "classes", "label_names", "target_names"),
}
"""What an array is, by the names that it may have; train_images and so on are MedMNIST's."""
_UNSPLIT: dict[str, tuple[str, ...]] = {
    "x_train": ("x", "X", "images", "image", "data"),
    "y_train": ("y", "Y", "labels", "label", "targets", "target"),
}
"""The names of arrays that are not split."""


@dataclass(frozen=True)
class _Images:
    """The shape and layout of an image array, from its header."""

    name: str
    shape: tuple[int, ...]
    fortran_order: bool

    @property
    def chw(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        if len(self.shape) == 3:
            return 1, self.shape[1], self.shape[2]
        _, first, second, third = self.shape
        return (third, first, second) if self.channels_last else (first, second, third)

    @property
    def channels_last(self) -> bool:
        return self.shape[3] in (1, 3)

    def planes(self, chunk: Pixels) -> Pixels:
        """Rows as stored, as n × C × H × W."""
        if len(self.shape) == 3:
            return chunk[:, None]
        return chunk.transpose(0, 3, 1, 2) if self.channels_last else chunk


def open_arrays(path: Path, image_size: int | None) -> Source:
    """Check names, types, shapes and labels, without reading the images."""
    with _reading("The .npz file"), zipfile.ZipFile(path) as archive:
        return _open(path, archive, image_size)


def _open(path: Path, archive: zipfile.ZipFile, image_size: int | None) -> Source:
    stored = _stored({name.removesuffix(".npy") for name in archive.namelist()})
    if "x_train" in stored and len(archive.namelist()) == 1:
        return _unlabelled(path, _image_header(archive, stored["x_train"]), image_size)
    splits = _splits(stored, archive)
    images = {split: _image_header(archive, stored[f"x_{split}"]) for split in splits}
    labels = {split: _labels(archive, stored[f"y_{split}"], images[split]) for split in splits}
    named = "class_names" in stored
    class_names = _class_names(archive, stored["class_names"]) if named else numbered(labels["train"])
    for split in splits:
        _check_labels(stored[f"y_{split}"], labels[split], class_names)
    require_all_classes(labels["train"], class_names)
    if "test" in splits and images["train"].chw != images["test"].chw:
        raise DatasetUnreadable(
            f"{stored['x_train']} holds images of shape {images['train'].shape[1:]}, {stored['x_test']} of "
            f"{images['test'].shape[1:]}."
        )
    channels, height, width = images["train"].chw
    aside = {split: np.zeros(len(labels[split]), dtype=np.bool_) for split in splits}
    if "test" not in splits:
        aside["train"] = carve(labels["train"])
        labels = {"train": labels["train"][~aside["train"]], "test": labels["train"][aside["train"]]}
    return Source(
        kind="arrays",
        class_names=class_names,
        channels=channels,
        height=image_size or height,
        width=image_size or width,
        labels=labels,
        test_carved="test" not in splits,
        pieces=lambda: _pieces(path, images, aside, image_size),
    )


def _unlabelled(path: Path, images: _Images, image_size: int | None) -> Source:
    channels, height, width = images.chw
    none_aside = np.zeros(images.shape[0], dtype=np.bool_)
    return Source(
        kind="arrays",
        class_names=(),
        channels=channels,
        height=image_size or height,
        width=image_size or width,
        labels=no_labels(images.shape[0]),
        test_carved=False,
        pieces=lambda: _pieces(path, {"train": images}, {"train": none_aside}, image_size),
    )


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn every error of zip, deflate and numpy into DatasetUnreadable."""
    try:
        yield
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{what} cannot be read: {error}.", "Write the file again with numpy.savez.") from error


def _stored(names: set[str]) -> dict[str, str]:
    """Return the name in the file of each array that is used. Raises DatasetUnreadable if two stand for one."""
    stored: dict[str, str] = {}
    for table in (NAMES, _UNSPLIT):
        for array, usual in table.items():
            found = sorted(names.intersection(usual))
            if array not in stored and len(found) > 1:
                raise DatasetUnreadable(f"{' and '.join(found)} both stand for {array}.", "Leave one of them out.")
            if found:
                stored.setdefault(array, found[0])
    return stored


def _splits(stored: dict[str, str], archive: zipfile.ZipFile) -> tuple[Split, ...]:
    wanted = ["x_train", "y_train"]
    if stored.keys() & {"x_test", "y_test"}:
        wanted += ["x_test", "y_test"]
    if missing := [name for name in wanted if name not in stored]:
        present = ", ".join(sorted(name.removesuffix(".npy") for name in archive.namelist())) or "nothing"
        raise DatasetUnreadable(
            f"The file lacks {', '.join(missing)}; it holds {present}.",
            "Name the arrays x_train, y_train, x_test, y_test and, optionally, class_names; x alone has no labels. "
            "Names such as train_images and train_labels are known, too.",
        )
    return ("train", "test") if "x_test" in wanted else ("train",)


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise DatasetUnreadable(
            f"{name} holds Python objects, which are never unpickled.", "Store plain numbers or text: np.array([...])."
        )
    return shape, fortran_order, dtype


def _image_header(archive: zipfile.ZipFile, name: str) -> _Images:
    member = archive.getinfo(f"{name}.npy")
    with _reading(name), archive.open(member) as file:
        shape, fortran_order, dtype = _header(file, name)
        start = file.tell()
    if dtype != np.uint8:
        raise DatasetUnreadable(f"{name} is {dtype}; images are uint8, 0..255.", _FLOAT_HINT)
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3) and shape[1] not in (1, 3)):
        raise DatasetUnreadable(f"{name} has shape {shape}.", _right_order(name, shape))
    if 0 in shape:
        raise DatasetUnreadable(f"{name} is empty: its shape is {shape}.")
    if member.file_size > max(LIMITS.ratio_from_bytes, LIMITS.ratio * member.compress_size):
        raise DatasetUnreadable(
            f"{name} unpacks to more than {LIMITS.ratio} times its size: it looks like a bomb.",
            "If the images are really so even, store them without compression: numpy.savez.",
        )
    if member.file_size != start + int(np.prod(shape, dtype=object)):
        raise DatasetUnreadable(
            f"{name} is cut short: its shape is {shape}, but it has {member.file_size - start} bytes."
        )
    return _Images(name, shape, fortran_order)


def _right_order(name: str, shape: tuple[int, ...]) -> str:
    """Return the orders that are read, and the line that brings an array to one if its shape tells it."""
    orders = "Images are N x H x W x C or N x C x H x W with C 1 or 3, or N x H x W"
    if len(shape) == 4 and shape[2] in (1, 3):
        return f"{orders}: from H x W x C x N, as MATLAB has it, {name}.transpose(3, 0, 1, 2)."
    if len(shape) == 4 and shape[0] in (1, 3):
        return f"{orders}: from C x N x H x W, {name}.transpose(1, 0, 2, 3)."
    if len(shape) == 2:
        for channels, row in ((1, ""), (3, "3, ")):
            side = math.isqrt(shape[1] // channels)
            if side > 1 and side * side * channels == shape[1]:
                return f"{orders}: from flat rows, {name}.reshape(-1, {row}{side}, {side})."
    return f"{orders}."


def _small(archive: zipfile.ZipFile, name: str) -> npt.NDArray[np.generic]:
    """Return an array of labels or names."""
    size = archive.getinfo(f"{name}.npy").file_size
    if size > _SMALL_BYTES:
        raise DatasetUnreadable(f"{name} has {size:,} bytes; the most is {_SMALL_BYTES:,}.")
    with _reading(name), archive.open(f"{name}.npy") as file:
        _header(file, name)
    with _reading(name), archive.open(f"{name}.npy") as file:
        array: npt.NDArray[np.generic] = npy.read_array(file, allow_pickle=False)
    return array


def _labels(archive: zipfile.ZipFile, name: str, images: _Images) -> Labels:
    labels = _small(archive, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DatasetUnreadable(
            f"{name} is {labels.dtype} of shape {labels.shape}; labels are integers, one an image.",
            "For one-hot labels: y.argmax(1).",
        )
    if len(labels) != images.shape[0]:
        last = images.shape[-1] == len(labels)
        raise DatasetUnreadable(
            f"{name} has {len(labels)} labels for {images.shape[0]} images.",
            f"If the images are along the last axis: numpy.moveaxis({images.name}, -1, 0)." if last else None,
        )
    return labels.astype(np.int64)


def _class_names(archive: zipfile.ZipFile, name: str) -> tuple[str, ...]:
    names = _small(archive, name)
    if names.ndim != 1 or names.dtype.kind not in "US" or len(names) == 0:
        raise DatasetUnreadable(f"{name} is {names.dtype} of shape {names.shape}; it is a list of text.")
    if names.dtype.kind == "S":
        return tuple(name.decode("utf-8", "replace") for name in names.tolist())
    return tuple(names.tolist())


def numbered(train: Labels) -> tuple[str, ...]:
    """Return a number as the name of each class. Raises DatasetUnreadable, before names are made, if there are more
    classes than images."""
    if train.max() >= len(train):
        raise DatasetUnreadable(
            f"The labels of {len(train)} training images go up to {train.max()}.",
            "Labels run from 0 to the number of classes minus one, and each must occur in the training split.",
        )
    return tuple(str(label) for label in range(max(1, int(train.max()) + 1)))


def _check_labels(name: str, labels: Labels, class_names: tuple[str, ...]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise DatasetUnreadable(
            f"{name} row {wrong[0]} is {labels[wrong[0]]}; labels run from 0 to {len(class_names) - 1}."
        )


def _pieces(
    path: Path, images: dict[Split, _Images], aside: dict[Split, npt.NDArray[np.bool_]], size: int | None
) -> Iterator[Piece]:
    for split, of in images.items():
        out = aside[split]
        rows = np.where(out, np.cumsum(out), np.cumsum(~out)) - 1
        start = 0
        for chunk in _chunks(path, of):
            stop = start + len(chunk)
            pixels = resized(of.planes(chunk), size)
            yield Piece(split, rows[start:stop][~out[start:stop]], pixels[~out[start:stop]])
            if out[start:stop].any():
                yield Piece("test", rows[start:stop][out[start:stop]], pixels[out[start:stop]])
            start = stop


def _chunks(path: Path, images: _Images) -> Iterator[Pixels]:
    """Yield the array as stored, a few rows at a time."""
    count, *row = images.shape
    row_bytes = int(np.prod(row))
    with _reading(images.name), zipfile.ZipFile(path) as archive, archive.open(f"{images.name}.npy") as file:
        _header(file, images.name)
        if images.fortran_order:
            yield np.frombuffer(file.read(), dtype=np.uint8).reshape(images.shape, order="F")
            return
        rows = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, count, rows):
            blob = file.read(min(rows, count - start) * row_bytes)
            yield np.frombuffer(blob, dtype=np.uint8).reshape(-1, *row)


def resized(pixels: Pixels, size: int | None) -> Pixels:
    """Return images n × C × H × W resized to a square of the given size, as image files are."""
    if size is None or pixels.shape[2:] == (size, size):
        return pixels
    return np.stack([_resize(image, size) for image in pixels])


def _resize(image: Pixels, size: int) -> Pixels:
    channels = len(image)
    return image_files.planes(Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0)), channels, size)
