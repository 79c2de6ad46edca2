"""Images in an archive, as `layouts.py` sorts them into splits and classes.

Images may be deeper inside their class folder. Class numbers follow the sorted folder names, as in torchvision's
ImageFolder, so teachers trained on the same folders fit.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from base.errors import DatasetUnreadable
from kdcore.data import image_files
from kdcore.data.archive import LIMITS, Budget, Entry, Limits, entries
from kdcore.data.decoding import (
    Codec,
    Encoded,
    OnEncoded,
    Piece,
    Source,
    Split,
    Stream,
    carve,
    drawn,
    no_labels,
    require_all_classes,
)
from kdcore.data.image_files import Header
from kdcore.data.images import Labels
from kdcore.data.layouts import READ, UNLABELLED, Classes, Member, read_layout
from kdcore.data.reading_ahead import attempt_ahead, decode_ahead
from kdcore.data.tables import MOST_BYTES, MOST_TABLES, SUFFIXES, Tables
from kdcore.spec import DataOptions

NOTES = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml", ".ini", ".log", ".pdf", ".db"}
"""Suffixes of texts beside the images: no samples. Tables among them are read if labels are missing."""
_CONVERT = "If these are pictures, convert them to PNG or JPEG. docs/data.md lists all files that are read."
_WHOLE_BYTES = 1 << 20
"""Larger files are read only if they begin like a picture."""
_MOST_NAMED = 20
_LONGEST_NAME = 200


_Archive = Callable[[], Iterator[Entry]]


def open_folders(path: Path, options: DataOptions | None = None, limits: Limits = LIMITS) -> Source:
    """Read the archive's layout, classes, sizes and colours, from the header of every image."""
    options = options or DataOptions()
    archive = partial(entries, path, limits, options.encoding)
    members, merged = _read_entries(archive(), options, limits, Budget(path, limits))
    layout = read_layout(members, lambda: Tables(lambda: _texts(archive, members)))
    by_class, skipped = _without_unreadable(archive, layout.classes, options)
    for split, classes in by_class.items():
        _check(split, classes, by_class["train"])
    height, width, channels = _shape(by_class, options.image_size)
    files: dict[Split, list[Member]] = {
        split: [file for of in classes.values() for file in of] for split, classes in by_class.items()
    }
    flat = layout.form == UNLABELLED
    class_names = () if flat else tuple(by_class["train"])
    labels = no_labels(len(files["train"])) if flat else _labels(by_class, class_names)
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
    headers = [file.header for of in files.values() for file in of if isinstance(file.header, Header)]
    pictures, pixels_cut = image_files.count(headers, options)
    places = {
        file.ordinal: (split, row, _pixels(file)) for split, rows in files.items() for row, file in enumerate(rows)
    }
    return Source(
        kind="folders",
        class_names=class_names,
        channels=channels,
        height=height,
        width=width,
        labels=labels,
        test_carved=test_carved,
        pieces=lambda: _pieces(archive, places, (channels, height, width), options),
        stream=Stream(Codec(channels), partial(_pieces, archive, places, (channels, height, width), options)),
        layout=layout.form,
        splits=layout.splits,
        left_out=layout.left_out,
        merged=merged,
        respelled=layout.respelled,
        repeated=[name[:_LONGEST_NAME] for name in layout.repeated],
        pictures=pictures,
        pixels_cut=pixels_cut,
        own_side=image_files.own_side(headers, options),
        skipped=skipped,
    )


def _without_unreadable(
    archive: _Archive, layout: dict[Split, Classes], options: DataOptions
) -> tuple[dict[Split, Classes], list[str]]:
    """Return the layout without image files that cannot be read, and their names.

    Raises DatasetUnreadable, which names them all, unless they are to be skipped. If the headers are in order, and
    nothing is to be skipped, the decoding itself finds what is broken.
    """
    files = [file for classes in layout.values() for of in classes.values() for file in of]
    faults = {file.ordinal: file.header for file in files if isinstance(file.header, DatasetUnreadable)}
    if not faults and not options.skip_unreadable:
        return layout, []
    rest: dict[int, tuple[Split, int, int]] = {
        file.ordinal: ("train", file.ordinal, _pixels(file)) for file in files if file.ordinal not in faults
    }
    for one in attempt_ahead(_encoded(archive, rest), lambda file: image_files.check(file.blob, file.name, options)):
        if isinstance(one.result, DatasetUnreadable):
            faults[one.row] = one.result
    if faults and not options.skip_unreadable:
        raise image_files.unreadable([faults[file.ordinal] for file in files if file.ordinal in faults])
    left: dict[Split, Classes] = {
        split: {name: [file for file in of if file.ordinal not in faults] for name, of in classes.items()}
        for split, classes in layout.items()
    }
    return left, [file.name for file in files if file.ordinal in faults]


def _labels(layout: Mapping[Split, Classes], class_names: tuple[str, ...]) -> dict[Split, Labels]:
    labels: dict[Split, Labels] = {
        split: np.repeat(np.arange(len(class_names)), [len(classes[name]) for name in class_names])
        for split, classes in layout.items()
    }
    require_all_classes(labels["train"], class_names)
    return labels


def _read_entries(
    archive: Iterator[Entry], options: DataOptions, limits: Limits, budget: Budget
) -> tuple[list[Member], list[str]]:
    """Return all members, and the folders whose names were brought to one form and so became one."""
    members = []
    spellings: dict[str, set[str]] = {}
    broken = image_files.Broken(limits)
    for ordinal, entry in enumerate(archive):
        is_note = not entry.is_folder and entry.path.suffix.lower() in NOTES
        header = None if entry.is_folder or is_note else _header(entry, options)
        if isinstance(header, Header):
            budget.spend_pixels(header.height * header.width)
        broken.count(header, entry.path.suffix.lower() in image_files.SUFFIXES)
        members.append(Member(ordinal, str(entry.path), entry.path.parts, header, is_note))
        if not entry.is_folder:
            folder, stored = (name.rpartition("/")[0] for name in (members[-1].name, entry.stored))
            spellings.setdefault(folder, set()).add(stored.removeprefix("./"))
    merged = [folder[:_LONGEST_NAME] for folder, stored in spellings.items() if len(stored) > 1]
    if not any(item.is_image for item in members):
        first = next((str(item.header) for item in members if item.header is not None), "")
        raise DatasetUnreadable(f"The archive holds no images. {first}".strip(), _CONVERT if first else READ)
    return members, [
        *merged[:_MOST_NAMED],
        *([f"and {len(merged) - _MOST_NAMED} more"] if merged[_MOST_NAMED:] else []),
    ]


def _texts(archive: _Archive, members: Iterable[Member]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yield the texts that may be tables: those nearest to the top, and no template of answers for a competition."""
    tables = [
        (PurePosixPath(item.name).suffix.lower() == ".txt", len(item.below), item.name, item.ordinal)
        for item in members
        if item.is_note and item.name.lower().endswith(SUFFIXES) and "submission" not in item.name.lower()
    ]
    wanted = {ordinal for *_, ordinal in sorted(tables)[:MOST_TABLES]}
    for ordinal, entry in enumerate(archive() if wanted else ()):
        if ordinal in wanted:
            wanted.remove(ordinal)
            if entry.size <= MOST_BYTES:
                yield entry.path, entry.read()
        if not wanted:
            return


def _header(entry: Entry, options: DataOptions) -> Header | DatasetUnreadable:
    """Return the header, or the error: it is a fault only if the file is a sample, which is not known yet."""
    if entry.size == 0:
        return DatasetUnreadable(f"{entry.path} is an empty file.")
    try:
        head = entry.head(image_files.HEAD_BYTES) if entry.size > _WHOLE_BYTES and entry.head is not None else None
        if head is not None and not image_files.begins_like_one(head):
            return image_files.unknown(str(entry.path))
        return image_files.header(entry.read(), str(entry.path), options)
    except DatasetUnreadable as error:
        # Without the frames and causes that hold the file's bytes: a hostile archive has many broken files.
        return DatasetUnreadable(str(error), error.hint)


def _check(split: Split, classes: Classes, train: Classes) -> None:
    """Raise DatasetUnreadable unless every class has readable images and both splits have the same classes."""
    if not any(classes.values()):
        raise DatasetUnreadable(f"The {split} folder holds no images.")
    for name, files in classes.items():
        if not files and split != "val":
            raise DatasetUnreadable(f"The class folder {name!r} in {split} holds no images.", "Remove it or fill it.")
    extra, missing = sorted(classes.keys() - train.keys()), sorted(train.keys() - classes.keys())
    if extra or missing:
        where = "train" if extra else split
        raise DatasetUnreadable(
            f"The class {(extra or missing)[0]!r} is missing in {where}.", "Train and test need the same class folders."
        )


def _shape(layout: Mapping[Split, Classes], image_size: int | None) -> tuple[int, int, int]:
    headers = [
        file.header
        for classes in layout.values()
        for files in classes.values()
        for file in files
        if isinstance(file.header, Header)
    ]
    return shape_of(headers, image_size)


def shape_of(headers: list[Header], image_size: int | None) -> tuple[int, int, int]:
    """Return height, width and channels of all images: one channel only if all are grey."""
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


def _pixels(file: Member) -> int:
    return file.header.height * file.header.width if isinstance(file.header, Header) else 0


def _pieces(
    archive: _Archive,
    places: Mapping[int, tuple[Split, int, int]],
    image: tuple[int, int, int],
    options: DataOptions,
    on_encoded: OnEncoded | None = None,
) -> Iterator[Piece]:
    """Decode in the archive's order, on all free cores. `image`: the shape C × H × W of each."""
    return decode_ahead(
        _encoded(archive, places, on_encoded),
        lambda one: image_files.decode(one.blob, one.name, image[0], options),
        math.prod(image),
    )


def _encoded(
    archive: _Archive, places: Mapping[int, tuple[Split, int, int]], on_encoded: OnEncoded | None = None
) -> Iterator[Encoded]:
    """Yield the files that have a split, a row and a number of pixels, by their position in the archive."""
    for ordinal, entry in enumerate(archive()):
        if ordinal in places:
            split, row, pixels = places[ordinal]
            one = Encoded(split, row, str(entry.path), entry.read(), pixels)
            if on_encoded is not None:
                on_encoded(one._replace(place=entry.place()))
            yield one
