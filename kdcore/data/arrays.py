"""Arrays in one `.npz` file: x_train, y_train, x_test, y_test, and class_names if there are any. Held-out splits may
have other names (x_val, x_valid, x_eval, …; see `splits.py`). A file of x alone (or of x_train) has no labels.

So may all arrays: X_train, train_images and train_labels (MedMNIST), train_x, images and labels. Images are uint8,
N × H × W × C, N × C × H × W (C is 1 or 3) or N × H × W; another order of the axes is refused with the line that changes
it. Labels are integers from 0. Without x_test and y_test, a tenth of the training images is set aside. Nothing in the
file is ever unpickled, and images are read in chunks, so a file may be larger than memory. Arrays that are not used are
listed in the facts.
"""

import math
import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy
from PIL import Image

from base.errors import DatasetUnreadable
from base.zip_files import members
from kdcore.catalog.facts import LeftOut
from kdcore.data import image_files
from kdcore.data.archive import LIMITS, Budget, Place, place_zipped
from kdcore.data.decoding import (
    Codec,
    Encoded,
    OnEncoded,
    Piece,
    Pixels,
    Source,
    Split,
    Stream,
    carve,
    no_labels,
    require_all_classes,
)
from kdcore.data.images import Labels
from kdcore.data.layouts import shortened
from kdcore.data.splits import by_role, held_out, split_role, split_roles
from kdcore.spec import DataOptions

_CHUNK_BYTES = 16 << 20
_SMALL_BYTES = 256 << 20
_READING_FAILED = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError),
    *(ValueError, SyntaxError, TypeError, OverflowError, tokenize.TokenError),
)
_AS_BYTES = {
    "f": "for floats in 0..1, (x * 255).round().astype('uint8')",
    "b": "x.astype('uint8') * 255",
    "u": "for numbers in 0..255, x.astype('uint8'); for 16 bits, (x // 257).astype('uint8')",
}
"""What makes bytes of images, by the kind of their type."""


_KIND = r"(?P<images{0}>x|images?|data|pictures)|(?P<labels{0}>y|labels?|targets?)"
_OF_SPLIT = re.compile(f"(?:{_KIND.format('')})_(?P<after>.+)|(?P<before>.+)_(?:{_KIND.format('_after')})")
_UNSPLIT = {
    "x_train": {"x", "X", "images", "image", "data"},
    "y_train": {"y", "Y", "labels", "label", "targets", "target"},
}
"""The names of arrays that are not split."""
_CLASS_NAMES = ("class_names", "classes", "label_names", "target_names")


@dataclass(frozen=True)
class _Images:
    """The shape and layout of an image array, from its header."""

    name: str
    shape: tuple[int, ...]
    fortran_order: bool = False
    start: int | None = None
    """The byte of the file with the first pixel; None if the array is compressed."""

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
    with _reading("The .npz file"), path.open("rb") as file:
        # Before Python's reader, which makes an object for each of them.
        count = sum(1 for _ in islice(members(file.fileno()), LIMITS.arrays + 1))
    if count > LIMITS.arrays:
        raise DatasetUnreadable(
            f"The .npz file holds more than {LIMITS.arrays:,} arrays.", "Join the images to one array for each split."
        )
    with _reading("The .npz file"), zipfile.ZipFile(path) as archive:
        return _open(path, archive, options or DataOptions())


def _open(path: Path, archive: zipfile.ZipFile, options: DataOptions) -> Source:
    present = {name.removesuffix(".npy") for name in archive.namelist()}
    stored = _stored(present)
    budget = Budget(path, LIMITS)
    if present == {stored.get("x_train")}:
        return _unlabelled(path, _image_header(archive, stored["x_train"], budget), options)
    splits = _splits(stored, present)
    images = {split: _image_header(archive, stored[f"x_{name}"], budget) for split, name in splits.items()}
    labels = {split: _labels(archive, stored[f"y_{name}"], images[split]) for split, name in splits.items()}
    named = "class_names" in stored
    class_names = _class_names(archive, stored["class_names"]) if named else numbered(labels["train"])
    for split, name in splits.items():
        _check_labels(stored[f"y_{name}"], labels[split], class_names)
    require_all_classes(labels["train"], class_names)
    for split in splits:
        if images["train"].chw != images[split].chw:
            raise DatasetUnreadable(
                f"{images['train'].name} holds images of shape {images['train'].shape[1:]}, {images[split].name} of "
                f"{images[split].shape[1:]}."
            )
    used = {stored[f"{kind}_{name}"] for name in splits.values() for kind in "xy"} | {stored.get("class_names")}
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
        stream=_stream(path, images, aside, options),
        layout="arrays",
        splits={of.name: of.shape[0] for of in images.values()},
        left_out=_left_out(archive, stored, present - used),
        **cut((height, width), sum(of.shape[0] for of in images.values()), options),
    )


def _unlabelled(path: Path, images: _Images, options: DataOptions) -> Source:
    channels, height, width = images.chw
    aside: dict[Split, npt.NDArray[np.bool_]] = {"train": np.zeros(images.shape[0], dtype=np.bool_)}
    return Source(
        kind="arrays",
        class_names=(),
        channels=channels,
        height=options.image_size or height,
        width=options.image_size or width,
        labels=no_labels(images.shape[0]),
        test_carved=False,
        pieces=lambda: _pieces(path, {"train": images}, aside, options),
        stream=_stream(path, {"train": images}, aside, options),
        layout="arrays",
        **cut((height, width), images.shape[0], options),
    )


def cut(size: tuple[int, int], count: int, options: DataOptions) -> dict[str, Any]:
    """Return what a crop leaves out of so many images of one height and width: fields of the source."""
    share = 1 - image_files.share_kept(*size, options)
    return {
        "pictures": {"cut": count} if share > image_files.NOTICEABLE_CUT else {},
        "pixels_cut": round(share, 4),
        "own_side": image_files.own_side([image_files.Header(*size, grey=True)], options),
    }


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn every error of zip, deflate and numpy into DatasetUnreadable."""
    try:
        yield
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{what} cannot be read: {error}.", "Write the file again with numpy.savez.") from error


def _stored(names: set[str]) -> dict[str, str]:
    """Return the name in the file of each array that is known, by its plain name: x_<split>, y_<split>, class_names.

    Raises DatasetUnreadable if two stand for one.
    """
    stored: dict[str, str] = {}
    for name in sorted(names):
        plain = _plain(name)
        if plain is not None and plain in stored:
            raise DatasetUnreadable(f"{stored[plain]} and {name} both stand for {plain}.", "Leave one of them out.")
        if plain is not None:
            stored[plain] = name
    for plain, usual in _UNSPLIT.items():
        found = sorted(names & usual)
        if plain not in stored and len(found) > 1:
            raise DatasetUnreadable(f"{' and '.join(found)} both stand for {plain}.", "Leave one of them out.")
        if found:
            stored.setdefault(plain, found[0])
    return stored


def _plain(name: str) -> str | None:
    """Return x_<split> or y_<split> for X_train, train_images, labels_val and the like; None for other names."""
    if name in _CLASS_NAMES:
        return "class_names"
    part = _OF_SPLIT.fullmatch(name.lower())
    if part is None:
        return None
    split = part["before"] or part["after"]
    role = split_role(split)
    kind = "x" if part["images"] or part["images_after"] else "y"
    if role is None:
        return None
    return f"{kind}_{role[0] if role[0] in ('train', 'test') and not role[1] else split}"


def _splits(stored: Mapping[str, str], present: set[str]) -> dict[Split, str]:
    """Return the splits with their plain names. A test split must be whole; another one without labels, or without
    images, is left out."""
    wanted = ["x_train", "y_train"]
    if stored.keys() & {"x_test", "y_test"}:
        wanted += ["x_test", "y_test"]
    if missing := [name for name in wanted if name not in stored]:
        raise DatasetUnreadable(
            f"The file lacks {', '.join(missing)}; it holds {', '.join(sorted(present)) or 'nothing'}.",
            "Name the arrays x_train, y_train, x_test, y_test and, optionally, class_names; x alone has no labels. "
            "Names such as train_images and train_labels are known, too.",
        )
    whole = {name[2:] for name in stored if name.startswith("x_") and f"y_{name[2:]}" in stored}
    roles = {name: role for name, role in split_roles(whole).items() if role != "train"}
    name_of = by_role(roles)
    measures, chooses = held_out(name_of)
    splits: dict[Split, str] = {"train": "train"}
    if chooses is not None:
        splits["val"] = name_of[chooses]
    if measures is not None:
        splits["test"] = name_of[measures]
    return splits


def _left_out(archive: zipfile.ZipFile, stored: Mapping[str, str], unused: Iterable[str]) -> list[LeftOut]:
    """Return the arrays that are not used, with their rows."""
    found = []
    for name in sorted(unused):
        why = "no array of this name is read"
        plain = _plain(name)
        if plain is not None and plain[2:] != "train":
            partner = f"{'y' if plain[0] == 'x' else 'x'}_{plain[2:]}"
            why = "its split has no task beside the others" if partner in stored else f"there is no {partner}"
        found.append(LeftOut(what=name, count=_rows(archive, name), why=why))
    return shortened(found)


def _rows(archive: zipfile.ZipFile, name: str) -> int:
    """Return the length of an array that is not used; 1 for anything else."""
    try:
        with archive.open(f"{name}.npy") as file:
            shape, *_ = npy.read_array_header_1_0(file) if npy.read_magic(file) == (1, 0) else ((),)
    except (*_READING_FAILED, KeyError):
        return 1
    return shape[0] if shape else 1


def _header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise DatasetUnreadable(
            f"{name} holds Python objects, which are never unpickled.", "Store plain numbers or text: np.array([...])."
        )
    if any(type(side) is not int or side < 0 for side in shape):
        raise DatasetUnreadable(f"{name} has the shape {shape}, which no array has.", "Write the file again.")
    return shape, fortran_order, dtype


def _require_whole(member: zipfile.ZipInfo, start: int, name: str, shape: tuple[int, ...], item_bytes: int) -> None:
    """Raise DatasetUnreadable unless an array has as many bytes as its shape says."""
    found, said = member.file_size - start, math.prod(shape) * item_bytes
    if found != said:
        what = "is cut short" if found < said else "is longer than it says"
        raise DatasetUnreadable(f"{name} {what}: its shape is {shape}, but it has {found:,} bytes.")


def _image_header(archive: zipfile.ZipFile, name: str, budget: Budget) -> _Images:
    member = archive.getinfo(f"{name}.npy")
    with _reading(name), archive.open(member) as file:
        shape, fortran_order, dtype = _header(file, name)
        start = file.tell()
    if dtype != np.uint8:
        raise DatasetUnreadable(f"{name} is {dtype}; images are uint8, 0..255.", f"Store bytes: {_as_bytes(dtype)}.")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3) and shape[1] not in (1, 3)):
        raise DatasetUnreadable(f"{name} has shape {shape}.", _right_order(name, shape))
    if 0 in shape:
        raise DatasetUnreadable(f"{name} is empty: its shape is {shape}.")
    if shape[0] > LIMITS.rows:
        raise DatasetUnreadable(f"{name} holds {shape[0]:,} images; the most is {LIMITS.rows:,}.")
    _require_whole(member, start, name, shape, 1)
    try:
        budget.spend(member.file_size)
    except DatasetUnreadable as error:
        hint = "If the images are really so even, store them without compression: numpy.savez."
        raise DatasetUnreadable(error.message.replace("The archive", "The .npz file"), hint) from None
    place = place_zipped(archive.fp.fileno(), member) if archive.fp is not None else None
    return _Images(name, shape, fortran_order, None if place is None or place.deflated else place.start + start)


def _as_bytes(dtype: np.dtype[np.generic]) -> str:
    return _AS_BYTES.get({"i": "u"}.get(dtype.kind, dtype.kind), _AS_BYTES["f"])


def _right_order(name: str, shape: tuple[int, ...]) -> str:
    """Return the orders that are read, and the line that brings an array to one if its shape tells it."""
    orders = "Images are N x H x W x C or N x C x H x W with C 1 or 3, or N x H x W"
    if len(shape) == 4 and shape[2] in (1, 3):
        return f"{orders}: from H x W x C x N, as MATLAB has it, {name}.transpose(3, 0, 1, 2)."
    if len(shape) == 4 and shape[0] in (1, 3) and shape[1] == shape[2] != shape[3]:
        return f"{orders}: from C x H x W x N, {name}.transpose(3, 1, 2, 0)."
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
    member = archive.getinfo(f"{name}.npy")
    if member.file_size > _SMALL_BYTES:
        raise DatasetUnreadable(f"{name} has {member.file_size:,} bytes; the most is {_SMALL_BYTES:,}.")
    with _reading(name), archive.open(member) as file:
        shape, _, dtype = _header(file, name)
        start = file.tell()
    _require_whole(member, start, name, shape, dtype.itemsize)
    if shape and shape[0] > LIMITS.rows:
        raise DatasetUnreadable(f"{name} has {shape[0]:,} rows; the most is {LIMITS.rows:,}.")
    with _reading(name), archive.open(f"{name}.npy") as file:
        array: npt.NDArray[np.generic] = npy.read_array(file, allow_pickle=False)
    return array


def _right_labels(name: str, labels: npt.NDArray[np.generic]) -> str:
    """Return the line that makes labels of such an array."""
    if labels.ndim == 2 and labels.shape[0] > 1:
        return f"For one-hot labels: {name}.argmax(1)."
    if labels.dtype.kind in "US":
        return f"For names: class_names, {name} = numpy.unique({name}, return_inverse=True), and save both."
    return f"If they are whole numbers: {name}.ravel().astype('int64')."


def _labels(archive: zipfile.ZipFile, name: str, images: _Images) -> Labels:
    labels = _small(archive, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DatasetUnreadable(
            f"{name} is {labels.dtype} of shape {labels.shape}; labels are integers, one an image.",
            _right_labels(name, labels),
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
    if len(names) > LIMITS.classes:
        raise DatasetUnreadable(f"{name} has {len(names):,} names; the most is {LIMITS.classes:,}.")
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
    if train.max() >= LIMITS.classes:
        raise DatasetUnreadable(f"The labels go up to {train.max():,}; there may be {LIMITS.classes:,} classes.")
    return tuple(str(label) for label in range(max(1, int(train.max()) + 1)))


def _check_labels(name: str, labels: Labels, class_names: tuple[str, ...]) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise DatasetUnreadable(
            f"{name} row {wrong[0]} is {labels[wrong[0]]}; labels run from 0 to {len(class_names) - 1}."
        )


def _stream(
    path: Path, images: dict[Split, _Images], aside: dict[Split, npt.NDArray[np.bool_]], options: DataOptions
) -> Stream | None:
    """Return how single rows are read; None if an array is compressed or in Fortran's order, or if layouts differ."""
    shapes = {of.shape[1:] for of in images.values()}
    if len(shapes) > 1 or any(of.start is None or of.fortran_order for of in images.values()):
        return None
    channels = images["train"].chw[0]
    return Stream(Codec(channels, array=shapes.pop()), partial(_pieces, path, images, aside, options))


def row_pixels(blob: bytes, shape: tuple[int, ...], options: DataOptions) -> Pixels:
    """Return one image, uint8 C × H × W, from its bytes in an array whose images have this shape."""
    rows = np.frombuffer(blob, dtype=np.uint8).reshape(1, *shape)
    pixels: Pixels = resized(_Images("", rows.shape).planes(rows), options)[0]
    return pixels


def _pieces(
    path: Path,
    images: dict[Split, _Images],
    aside: dict[Split, npt.NDArray[np.bool_]],
    options: DataOptions,
    on_encoded: OnEncoded | None = None,
) -> Iterator[Piece]:
    for split, of in images.items():
        out = aside[split]
        rows = np.where(out, np.cumsum(out), np.cumsum(~out)) - 1
        start = 0
        for chunk in _chunks(path, of):
            stop = start + len(chunk)
            if on_encoded is not None and of.start is not None:
                size = math.prod(of.shape[1:])
                for at, row in enumerate(chunk, start):
                    place = Place(of.start + at * size, size, size)
                    on_encoded(Encoded("test" if out[at] else split, int(rows[at]), of.name, row.tobytes(), 0, place))
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
