"""Class folders in an archive: `train/<class>/…` with `test|val/<class>/…`, or `<class>/…` alone. Images without class
folders have no labels.

One outer folder around everything is ignored. Images may be deeper inside their class folder. Class numbers follow the
sorted folder names, as in torchvision's ImageFolder, so teachers trained on the same folders fit.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from base.errors import DatasetUnreadable
from kdcore.data import image_files
from kdcore.data.archive import LIMITS, Entry, Limits, entries
from kdcore.data.decoding import Piece, Source, Split, carve, drawn, no_labels, require_all_classes
from kdcore.data.image_files import Header
from kdcore.data.images import Labels
from kdcore.spec import DataOptions

TEST_FOLDERS = ("test", "val", "valid", "validation")
"""In order of preference: if both `test` and `val` hold class folders, `val` is not used."""
NOTES = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml", ".ini", ".log", ".pdf", ".db"}
"""Suffixes of files beside the images, which are ignored."""
_CHUNK = 256


@dataclass(frozen=True)
class _Member:
    """A file, or a folder (which has no header): its position in the archive, its name, and its path below the folder
    that is read."""

    ordinal: int
    name: str
    below: tuple[str, ...]
    header: Header | DatasetUnreadable | None

    @property
    def is_stray(self) -> bool:
        """True for a file directly in this folder."""
        return self.header is not None and len(self.below) == 1

    @property
    def is_image(self) -> bool:
        return isinstance(self.header, Header)

    def inside(self) -> "_Member":
        return _Member(self.ordinal, self.name, self.below[1:], self.header)


T = TypeVar("T")

_Classes = dict[str, list[_Member]]
_Archive = Callable[[], Iterator[Entry]]


def open_folders(
    path: Path, options: DataOptions | None = None, limits: Limits = LIMITS, encoding: str | None = None
) -> Source:
    """Read the archive's layout, classes, sizes and colours, from the header of every image.

    `encoding` is that of names in a .zip that are not marked as UTF-8.
    """
    options = options or DataOptions()
    archive = partial(entries, path, limits, encoding)
    members = _read_entries(archive(), options)
    flat = _flat(members)
    layout: dict[Split, _Classes] = {"train": {"": flat}} if flat else _layout(members)
    layout, skipped = _without_unreadable(archive, layout, options)
    for split, classes in layout.items():
        _check(split, classes, layout["train"])
    height, width, channels = _shape(layout, options.image_size)
    files: dict[Split, list[_Member]] = {s: [f for of in classes.values() for f in of] for s, classes in layout.items()}
    class_names = () if flat else tuple(layout["train"])
    labels = no_labels(len(layout["train"][""])) if flat else _labels(layout, class_names)
    test_carved = "test" not in labels
    if test_carved:
        aside = carve(labels["train"])
        files = {
            "train": [file for file, out in zip(files["train"], aside, strict=True) if not out],
            "test": [file for file, out in zip(files["train"], aside, strict=True) if out],
        }
        labels = {"train": labels["train"][~aside], "test": labels["train"][aside]}
    kept = drawn(labels["train"], options)
    files["train"] = [file for file, keep in zip(files["train"], kept, strict=True) if keep]
    labels["train"] = labels["train"][kept]
    headers = (file.header for of in files.values() for file in of if isinstance(file.header, Header))
    pictures, pixels_cut = image_files.count(headers, options)
    places = {file.ordinal: (split, row) for split, rows in files.items() for row, file in enumerate(rows)}
    return Source(
        kind="folders",
        class_names=class_names,
        channels=channels,
        height=height,
        width=width,
        labels=labels,
        test_carved=test_carved,
        pieces=lambda: _pieces(archive, places, channels, options),
        pictures=pictures,
        pixels_cut=pixels_cut,
        skipped=skipped,
    )


def _without_unreadable(
    archive: _Archive, layout: dict[Split, _Classes], options: DataOptions
) -> tuple[dict[Split, _Classes], list[str]]:
    """Return the layout without image files that cannot be read, and their names.

    Raises DatasetUnreadable, which names them all, unless they are to be skipped. If the headers are in order, and
    nothing is to be skipped, the decoding itself finds what is broken.
    """
    files = [file for classes in layout.values() for of in classes.values() for file in of]
    faults = {file.ordinal: file.header for file in files if isinstance(file.header, DatasetUnreadable)}
    if not faults and not options.skip_unreadable:
        return layout, []
    rest: dict[int, tuple[Split, int]] = {file.ordinal: ("train", 0) for file in files if file.ordinal not in faults}

    def is_readable(blob: bytes, name: str) -> bool:
        image_files.decode(blob, name, 3, options)
        return True

    for place, result in _each(archive, rest, is_readable):
        if isinstance(result, DatasetUnreadable):
            faults[place.ordinal] = result
    if faults and not options.skip_unreadable:
        raise image_files.unreadable([faults[file.ordinal] for file in files if file.ordinal in faults])
    left: dict[Split, _Classes] = {
        split: {name: [file for file in of if file.ordinal not in faults] for name, of in classes.items()}
        for split, classes in layout.items()
    }
    return left, [file.name for file in files if file.ordinal in faults]


def _labels(layout: Mapping[Split, _Classes], class_names: tuple[str, ...]) -> dict[Split, Labels]:
    labels: dict[Split, Labels] = {
        split: np.repeat(np.arange(len(class_names)), [len(classes[name]) for name in class_names])
        for split, classes in layout.items()
    }
    require_all_classes(labels["train"], class_names)
    return labels


def _read_entries(archive: Iterator[Entry], options: DataOptions) -> list[_Member]:
    members = []
    for ordinal, entry in enumerate(archive):
        if entry.is_folder:
            members.append(_Member(ordinal, str(entry.path), entry.path.parts, None))
        elif entry.path.suffix.lower() not in NOTES:
            members.append(_Member(ordinal, str(entry.path), entry.path.parts, _header(entry, options)))
    if not any(item.is_image for item in members):
        first = next((str(item.header) for item in members if item.header is not None), "")
        raise DatasetUnreadable(
            f"The archive holds no images. {first}".strip(), "Pack class folders of images: train/<class>/<image>."
        )
    return members


def _header(entry: Entry, options: DataOptions) -> Header | DatasetUnreadable:
    """Return the header, or the error: it is a fault only if the file is a sample, which is not known yet."""
    try:
        return image_files.header(entry.read(), str(entry.path), options)
    except DatasetUnreadable as error:
        return error


def _layout(members: list[_Member]) -> dict[Split, _Classes]:
    """Return images by split and class. Without a test part in the archive there is only `train`."""
    tops = _folders(members)
    if len(tops) == 1 and not _split_names(tops) and all(len(i.below) > 2 for i in members if i.is_image):
        members = next(iter(tops.values()))
        tops = _folders(members)
    splits = {
        name.lower(): (name, inside)
        for name, inside in tops.items()
        if name in _split_names(tops) and not _is_flat(inside)
    }
    test = next((splits[name] for name in TEST_FOLDERS if name in splits), None)
    if "train" in splits:
        layout: dict[Split, _Classes] = {"train": _classes(splits["train"][1])}
        return layout if test is None else {**layout, "test": _classes(test[1])}
    if test is not None and len(tops) == len(splits):
        raise DatasetUnreadable(f"There is a folder {test[0]!r} but none named 'train'.")
    return {"train": _classes(members)}


def _flat(members: list[_Member]) -> list[_Member]:
    """Return images without class folders, by name: directly here, or in one folder around all of them.
    Empty if there are class folders."""
    tops = _folders(members)
    if len(tops) == 1 and all(len(item.below) == 2 for item in members if item.is_image):
        members = next(iter(tops.values()))
    if not _is_flat(members):
        return []
    return sorted((item for item in members if item.is_stray), key=lambda item: item.name)


def _split_names(folders: Iterable[str]) -> set[str]:
    return {name for name in folders if name.lower() in ("train", *TEST_FOLDERS)}


def _is_flat(inside: list[_Member]) -> bool:
    """Return True if images are in no folder: they have no labels, or `train` is the name of a class."""
    depths = [len(item.below) for item in inside if item.is_image]
    return bool(depths) and max(depths) == 1


def _folders(members: list[_Member]) -> dict[str, list[_Member]]:
    """Return the content of each folder directly here."""
    folders: dict[str, list[_Member]] = {}
    for item in members:
        if item.below and not item.is_stray:
            folders.setdefault(item.below[0], []).append(item.inside())
    return folders


def _classes(members: list[_Member]) -> _Classes:
    """Return files by class; classes and files are in the order of their names."""
    stray = next((item for item in members if item.is_stray and item.is_image), None)
    if stray is not None:
        raise DatasetUnreadable(f"{stray.name} is in no class folder.", "Put each image in the folder of its class.")
    folders = _folders(members)
    return {
        name: sorted((item for item in folders[name] if item.header is not None), key=lambda item: item.name)
        for name in sorted(folders)
    }


def _check(split: Split, classes: _Classes, train: _Classes) -> None:
    """Raise DatasetUnreadable unless every class has readable images and both splits have the same classes."""
    if not any(classes.values()):
        raise DatasetUnreadable(f"The {split} folder holds no images.")
    for name, files in classes.items():
        if not files:
            raise DatasetUnreadable(f"The class folder {name!r} in {split} holds no images.", "Remove it or fill it.")
    extra, missing = sorted(classes.keys() - train.keys()), sorted(train.keys() - classes.keys())
    if extra or missing:
        where = "train" if extra else split
        raise DatasetUnreadable(
            f"The class {(extra or missing)[0]!r} is missing in {where}.", "Train and test need the same class folders."
        )


def _shape(layout: Mapping[Split, _Classes], image_size: int | None) -> tuple[int, int, int]:
    """Return height, width and channels of all images: one channel only if all are grey."""
    headers = [
        file.header
        for classes in layout.values()
        for files in classes.values()
        for file in files
        if isinstance(file.header, Header)
    ]
    channels = 1 if all(header.grey for header in headers) else 3
    if image_size is not None:
        return image_size, image_size, channels
    sizes = Counter((header.height, header.width) for header in headers)
    if len(sizes) > 1:
        sizes_text = ", ".join(f"{width}x{height} ({count} images)" for (height, width), count in sizes.most_common(3))
        more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        raise DatasetUnreadable(
            f"The images differ in size: {sizes_text}{more}.",
            "Set the size to resize them to: dataset.image_size, e.g. 64.",
        )
    (height, width), _ = sizes.popitem()
    return height, width, channels


def _pieces(
    archive: _Archive, places: Mapping[int, tuple[Split, int]], channels: int, options: DataOptions
) -> Iterator[Piece]:
    """Decode in the archive's order. Raises DatasetUnreadable at the end: it names all files that cannot be read."""
    faults: list[DatasetUnreadable] = []
    results = _each(archive, places, lambda blob, name: image_files.decode(blob, name, channels, options))
    while chunk := list(islice(results, _CHUNK)):
        faults += [result for _, result in chunk if isinstance(result, DatasetUnreadable)]
        good = [(place, result) for place, result in chunk if not isinstance(result, DatasetUnreadable)]
        if good and not faults:
            rows = np.array([place.row for place, _ in good], dtype=np.int64)
            yield from by_split([place.split for place, _ in good], rows, np.stack([pixels for _, pixels in good]))
    if faults:
        raise image_files.unreadable(faults)


class _Place(NamedTuple):
    """A file of the archive, and the row that it fills."""

    ordinal: int
    split: Split
    row: int


def _each(
    archive: _Archive, places: Mapping[int, tuple[Split, int]], work: Callable[[bytes, str], T]
) -> Iterator[tuple[_Place, T | DatasetUnreadable]]:
    """Yield the result of `work` for the content and name of each wanted file, or what is wrong with the file.

    There is one thread for each of torch's (Pillow releases the GIL).
    """

    def attempt(file: tuple[_Place, str, bytes]) -> tuple[_Place, T | DatasetUnreadable]:
        place, name, blob = file
        try:
            return place, work(blob, name)
        except DatasetUnreadable as error:
            return place, error

    wanted = (
        (_Place(ordinal, *places[ordinal]), str(entry.path), entry.read())
        for ordinal, entry in enumerate(archive())
        if ordinal in places
    )
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while chunk := list(islice(wanted, _CHUNK)):
            yield from pool.map(attempt, chunk)


def by_split(splits: Iterable[Split], rows: np.ndarray, pixels: np.ndarray) -> Iterator[Piece]:
    """Yield one piece for each split that occurs."""
    of = np.array(list(splits))
    for split in ("train", "test"):
        if (here := of == split).any():
            yield Piece(split, rows[here], pixels[here])
