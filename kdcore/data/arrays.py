"""Arrays in one `.npz` file: x_train, y_train, x_test, y_test, and class_names if there are any. A file of x alone (or
of x_train) holds images without labels.

Images are uint8, N × H × W × C, N × C × H × W (C is 1 or 3) or N × H × W; labels are integers from 0. Without
x_test and y_test, a tenth of the training images is set aside. Nothing in the file is ever unpickled, and images are
read in chunks, so a file may be larger than memory.
"""

import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import Image

from base.errors import DatasetUnreadable
from kdcore.data import image_files
from kdcore.data.decoding import Piece, Pixels, Source, Split, carve, no_labels, require_all_classes
from kdcore.data.images import Labels
from kdcore.spec import DataOptions

_CHUNK_BYTES = 16 << 20
_SMALL_BYTES = 256 << 20
_READING_FAILED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError),
    *(ValueError, SyntaxError, tokenize.TokenError),
)
_FLOAT_HINT = "Store bytes: for floats in 0..1, (x * 255).round().astype('uint8')."


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


def open_arrays(path: Path, options: DataOptions | None = None) -> Source:
    """Check names, types, shapes and labels, without reading the images."""
    with _reading("The .npz file"), zipfile.ZipFile(path) as archive:
        return _open(path, archive, options or DataOptions())


def _open(path: Path, archive: zipfile.ZipFile, options: DataOptions) -> Source:
    names = {name.removesuffix(".npy") for name in archive.namelist()}
    if names in ({"x"}, {"x_train"}):
        return _unlabelled(path, _image_header(archive, names.pop()), options)
    splits = _splits(names)
    images = {split: _image_header(archive, f"x_{split}") for split in splits}
    labels = {split: _labels(archive, f"y_{split}", images[split].shape[0]) for split in splits}
    class_names = _class_names(archive) if "class_names" in names else _numbered(labels["train"])
    for split in splits:
        _check_labels(f"y_{split}", labels[split], class_names)
    require_all_classes(labels["train"], class_names)
    if "test" in splits and images["train"].chw != images["test"].chw:
        raise DatasetUnreadable(
            f"x_train holds images of shape {images['train'].shape[1:]}, x_test of {images['test'].shape[1:]}."
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
        height=options.image_size or height,
        width=options.image_size or width,
        labels=labels,
        test_carved="test" not in splits,
        pieces=lambda: _pieces(path, images, aside, options),
        **_cut(images, options),
    )


def _unlabelled(path: Path, images: _Images, options: DataOptions) -> Source:
    channels, height, width = images.chw
    none_aside = np.zeros(images.shape[0], dtype=np.bool_)
    return Source(
        kind="arrays",
        class_names=(),
        channels=channels,
        height=options.image_size or height,
        width=options.image_size or width,
        labels=no_labels(images.shape[0]),
        test_carved=False,
        pieces=lambda: _pieces(path, {"train": images}, {"train": none_aside}, options),
        **_cut({"train": images}, options),
    )


def _cut(images: Mapping[Split, _Images], options: DataOptions) -> dict[str, Any]:
    """Return what a crop leaves out of the images, which all have one size: fields of the source."""
    of = next(iter(images.values()))
    cut = 1 - image_files.share_kept(*of.chw[1:], options)
    count = sum(one.shape[0] for one in images.values())
    return {"pictures": {"cut": count} if cut > image_files.NOTICEABLE_CUT else {}, "pixels_cut": round(cut, 4)}


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn every error of zip, deflate and numpy into DatasetUnreadable."""
    try:
        yield
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{what} cannot be read: {error}.", "Write the file again with numpy.savez.") from error


def _splits(names: set[str]) -> tuple[Split, ...]:
    wanted = ["x_train", "y_train"]
    if names & {"x_test", "y_test"}:
        wanted += ["x_test", "y_test"]
    if missing := [name for name in wanted if name not in names]:
        present = ", ".join(sorted(names)) or "nothing"
        raise DatasetUnreadable(
            f"The file lacks {', '.join(missing)}; it holds {present}.",
            "Name the arrays x_train, y_train, x_test, y_test and, optionally, class_names; x alone has no labels.",
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
        raise DatasetUnreadable(
            f"{name} has shape {shape}.", "Images are N x H x W x C or N x C x H x W with C 1 or 3, or N x H x W."
        )
    if 0 in shape:
        raise DatasetUnreadable(f"{name} is empty: its shape is {shape}.")
    if member.file_size != start + int(np.prod(shape, dtype=object)):
        raise DatasetUnreadable(
            f"{name} is cut short: its shape is {shape}, but it has {member.file_size - start} bytes."
        )
    return _Images(name, shape, fortran_order)


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


def _labels(archive: zipfile.ZipFile, name: str, images: int) -> Labels:
    labels = _small(archive, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DatasetUnreadable(
            f"{name} is {labels.dtype} of shape {labels.shape}; labels are integers, one an image.",
            "For one-hot labels: y.argmax(1).",
        )
    if len(labels) != images:
        raise DatasetUnreadable(f"{name} has {len(labels)} labels for {images} images.")
    return labels.astype(np.int64)


def _class_names(archive: zipfile.ZipFile) -> tuple[str, ...]:
    names = _small(archive, "class_names")
    if names.ndim != 1 or names.dtype.kind not in "US" or len(names) == 0:
        raise DatasetUnreadable(f"class_names is {names.dtype} of shape {names.shape}; it is a list of text.")
    if names.dtype.kind == "S":
        return tuple(name.decode("utf-8", "replace") for name in names.tolist())
    return tuple(names.tolist())


def _numbered(train: Labels) -> tuple[str, ...]:
    return tuple(str(label) for label in range(max(1, int(train.max()) + 1)))


def _check_labels(name: str, labels: Labels, class_names: tuple[str, ...]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise DatasetUnreadable(
            f"{name} row {wrong[0]} is {labels[wrong[0]]}; labels run from 0 to {len(class_names) - 1}."
        )


def _pieces(
    path: Path, images: dict[Split, _Images], aside: dict[Split, npt.NDArray[np.bool_]], options: DataOptions
) -> Iterator[Piece]:
    for split, of in images.items():
        out = aside[split]
        rows = np.where(out, np.cumsum(out), np.cumsum(~out)) - 1
        start = 0
        for chunk in _chunks(path, of):
            stop = start + len(chunk)
            pixels = resized(of.planes(chunk), options)
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


def resized(pixels: Pixels, options: DataOptions) -> Pixels:
    """Return images n × C × H × W resized to a square of `image_size`, if it is given, as image files are."""
    size = options.image_size
    if size is None or (pixels.shape[2:] == (size, size) and options.resize_to in (None, size)):
        return pixels
    return np.stack([_resize(image, options) for image in pixels])


def _resize(image: Pixels, options: DataOptions) -> Pixels:
    channels = len(image)
    picture = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
    return image_files.planes(picture, channels, options)
