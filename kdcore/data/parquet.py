"""Parquet tables of pictures, as Hugging Face's `datasets` writes them: one file, or several in a .zip or .tar.

One column holds the encoded pictures: a structure with the field `bytes` (the feature `Image`), or plain bytes. Another
one holds the labels: integers from 0, named by the feature `ClassLabel` if the table has it, or text. A table without
a column of labels holds images without labels. In an archive the names of the files, or of their folders, tell the
split: `train-00000-of-00002.parquet`, `test/0000.parquet`; see `splits.py`. Without such names all are training images.

A few rows are in memory at a time. pyarrow is optional: without it the error has the command that installs it.
"""

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from base.errors import DatasetUnreadable
from kdcore.catalog.facts import LeftOut
from kdcore.data import image_files
from kdcore.data.archive import LIMITS, Budget, Entry, Limits, entries
from kdcore.data.arrays import numbered
from kdcore.data.decoding import (
    Codec,
    Encoded,
    OnEncoded,
    Piece,
    Source,
    Split,
    Stream,
    carve,
    no_labels,
    require_all_classes,
)
from kdcore.data.folders import shape_of
from kdcore.data.image_files import Header
from kdcore.data.images import Labels
from kdcore.data.layouts import shortened
from kdcore.data.reading_ahead import attempt_ahead, decode_ahead
from kdcore.data.splits import Role, held_out, split_role
from kdcore.data.tables import SPLIT_COLUMNS
from kdcore.spec import DataOptions

IMAGE_COLUMNS = ("image", "img", "picture", "pixel_values", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "y", "class", "category")
_TRAIN: Split = "train"
_ROWS = 16
_INSTALL = "Where the service and its workers run: pip install pyarrow (the extra `parquet` of this project)."


class _Columns(NamedTuple):
    image: str
    label: str | None
    names: list[str] | None
    """The names of the classes, in the order of the labels, if the table has them."""
    split: str | None
    """A column that may say the split of each row; only one split may be in it."""
    other: list[str]
    """Columns that might be labels, if there is no column of labels."""


class _Row(NamedTuple):
    image: bytes
    name: str
    label: int | str | None


class PyarrowMissing(DatasetUnreadable):
    """A table cannot be read here, but can be as soon as pyarrow is installed: the refusal must not be remembered."""

    retryable = True


def open_parquet(
    path: Path, options: DataOptions | None = None, limits: Limits = LIMITS, archive: bool = False
) -> Source:
    """Read labels, sizes and colours of all rows: of one table, or of those in an archive."""
    options = options or DataOptions()
    members = partial(entries, path, limits, options.encoding) if archive else None
    split_of, left_out = _splits(members) if members is not None else ({path.name: _TRAIN}, [])

    def tables() -> Iterator[tuple[str, _Columns, Iterator[_Row]]]:
        return (table for table in _tables(path, limits, members) if table[0] in split_of)

    headers, given, first_of, names, other = _read_headers(tables(), Budget(path, limits), limits, options)
    pixels = array("q", (one.height * one.width if isinstance(one, Header) else 0 for one in headers))
    faults = {row: one for row, one in enumerate(headers) if isinstance(one, DatasetUnreadable)}
    skipped: dict[int, str] = {}
    if faults or options.skip_unreadable:
        skipped = _unreadable_rows(tables, pixels, faults, options)
    good = [one for row, one in enumerate(headers) if isinstance(one, Header) and row not in skipped]
    if not good:
        raise DatasetUnreadable("The table has no picture that can be read.")
    height, width, channels = shape_of(good, options.image_size)
    places: dict[str, tuple[Split, int]] = {}
    ordered: dict[Split, list[int | str | None]] = {"train": []}
    for file in sorted(given):
        split = split_of[file]
        places[file] = split, len(ordered.setdefault(split, []))
        ordered[split] += [label for row, label in enumerate(given[file], first_of[file]) if row not in skipped]
    class_names = _class_names(ordered, names)
    aside = {split: np.zeros(len(of), dtype=np.bool_) for split, of in ordered.items()}
    splits = no_labels(len(ordered["train"])) if not class_names else _labels(ordered, class_names)
    if class_names and "test" not in ordered:
        aside["train"] = carve(splits["train"])
        splits = {"train": splits["train"][~aside["train"]], "test": splits["train"][aside["train"]]}

    def encoded(on_encoded: OnEncoded | None) -> Iterator[Encoded]:
        rows_of = {split: np.where(out, np.cumsum(out), np.cumsum(~out)) - 1 for split, out in aside.items()}
        for file, _, rows in tables():
            split, number = places[file]
            for at, row in enumerate(rows, first_of[file]):
                if at not in skipped:
                    out = bool(aside[split][number])
                    place = int(rows_of[split][number])
                    one = Encoded("test" if out else split, place, row.name, row.image, pixels[at])
                    if on_encoded is not None:
                        on_encoded(one)
                    yield one
                    number += 1

    def pieces(on_encoded: OnEncoded | None = None) -> Iterator[Piece]:
        return decode_ahead(
            encoded(on_encoded),
            lambda one: image_files.decode(one.blob, one.name, channels, options),
            channels * height * width,
        )

    pictures, pixels_cut = image_files.count(good, options)
    return Source(
        kind="folders",
        class_names=class_names,
        channels=channels,
        height=height,
        width=width,
        labels=splits,
        test_carved=bool(aside["train"].any()),
        pieces=pieces,
        stream=Stream(Codec(channels), pieces),
        layout="parquet",
        splits={file: len(given[file]) for file in sorted(given)} if archive else {},
        left_out=left_out if class_names else shortened([*left_out, *_unread_columns(other, len(headers))]),
        pictures=pictures,
        pixels_cut=pixels_cut,
        own_side=image_files.own_side(good, options),
        skipped=list(skipped.values()),
    )


class _Headers(NamedTuple):
    """What the first pass over the tables finds."""

    headers: list[Header | DatasetUnreadable]
    """Of the rows of all tables."""
    labels: dict[str, list[int | str | None]]
    """Of each table."""
    first_of: dict[str, int]
    """The number of the first row of each table."""
    names: list[str] | None
    other: list[str]


def _read_headers(
    tables: Iterator[tuple[str, _Columns, Iterator[_Row]]], budget: Budget, limits: Limits, options: DataOptions
) -> _Headers:
    """Read labels, and sizes and colours of the pictures. Raises DatasetUnreadable if it is not worth reading on."""
    found, broken = _Headers([], {}, {}, None, []), image_files.Broken(limits)
    for file, columns, rows in tables:
        found = found._replace(names=_same_names(found.names, columns.names, file), other=columns.other)
        labels = found.labels.setdefault(file, [])
        found.first_of.setdefault(file, len(found.headers))
        for row in rows:
            budget.spend(len(row.image))
            header = _header(row, options)
            if isinstance(header, Header):
                budget.spend_pixels(header.height * header.width)
            broken.count(header)
            found.headers.append(header)
            labels.append(row.label)
            if len(found.headers) > limits.rows:
                raise DatasetUnreadable(f"The tables have more than {limits.rows:,} rows.")
    if not found.headers:
        raise DatasetUnreadable("The table has no rows.")
    return found


def _same_names(before: list[str] | None, names: list[str] | None, file: str) -> list[str] | None:
    """Return the names of the classes. Raises DatasetUnreadable if a table has others than those before it."""
    if before is not None and names is not None and names != before:
        raise DatasetUnreadable(
            f"{file} has other names of classes than the tables before it, or another order: "
            f"{', '.join(names[:5])}, … and {', '.join(before[:5])}, ….",
            "Cast the tables to the same ClassLabel, so that a number means one class everywhere.",
        )
    return before or names


def _unread_columns(names: Iterable[str], rows: int) -> list[LeftOut]:
    why = f"labels are read from a column {', '.join(LABEL_COLUMNS[:3])} or {LABEL_COLUMNS[3]}"
    return [LeftOut(what=f"the column {name!r}", count=rows, why=why) for name in names]


def _header(row: _Row, options: DataOptions) -> Header | DatasetUnreadable:
    try:
        return image_files.header(row.image, row.name, options)
    except DatasetUnreadable as error:
        # Without the frames and causes that hold the picture's bytes.
        return DatasetUnreadable(str(error), error.hint)


def _unreadable_rows(
    tables: Callable[[], Iterator[tuple[str, _Columns, Iterator[_Row]]]],
    pixels: Sequence[int],
    faults: dict[int, DatasetUnreadable],
    options: DataOptions,
) -> dict[int, str]:
    """Return the names of all rows that cannot be read, by their number over all tables; `faults` are those known.

    Raises DatasetUnreadable, which names them all, unless they are to be skipped.
    """
    names: dict[int, str] = {}

    def encoded() -> Iterator[Encoded]:
        every = (row for _, _, rows in tables() for row in rows)
        for at, row in enumerate(every):
            names[at] = row.name
            if at not in faults:
                yield Encoded(_TRAIN, at, row.name, row.image, pixels[at])

    found = attempt_ahead(encoded(), lambda one: image_files.check(one.blob, one.name, options))
    broken = {one.row: one.result for one in found if isinstance(one.result, DatasetUnreadable)} | faults
    if broken and not options.skip_unreadable:
        raise image_files.unreadable([broken[at] for at in sorted(broken)])
    return {at: names[at] for at in sorted(broken)}


def _splits(members: Callable[[], Iterator[Entry]]) -> tuple[dict[str, Split], list[LeftOut]]:
    """Return the split of each table in an archive, and those that are not used."""
    files = [str(one.path) for one in members() if _is_table(one)]
    roles: dict[str, Role] = {file: role for file in files if (role := _role(PurePosixPath(file))) is not None}
    if not roles:
        return dict.fromkeys(files, _TRAIN), []
    if "train" not in roles.values():
        raise DatasetUnreadable(
            f"No table in the archive is named like a training split: {', '.join(sorted(files)[:5])}.",
            "Name it train.parquet, or put it in a folder train.",
        )
    measures, chooses = held_out(roles.values())
    task: dict[Role | None, Split] = {chooses: "val", measures: "test", "train": "train"}
    used = {file: task[role] for file, role in roles.items() if role in task}
    return used, shortened(
        [
            LeftOut(what=file, count=1, why="its split has no task beside the others")
            for file in files
            if file not in used
        ]
    )


def _role(file: PurePosixPath) -> Role | None:
    """Return the split that the first word of a file, or else its folder, is named after."""
    for name in (re.split(r"[\W\d_]", file.stem)[0], file.parent.name):
        if (found := split_role(name)) is not None:
            return found[0]
    return None


def _is_table(entry: Entry) -> bool:
    return not entry.is_folder and entry.path.suffix == ".parquet"


def _class_names(ordered: dict[Split, list[int | str | None]], names: list[str] | None) -> tuple[str, ...]:
    """Return the names in the table, or those of labels that are text, or numbers; none without labels."""
    values = {label for of in ordered.values() for label in of}
    if values == {None}:
        return ()
    for split, of in ordered.items():
        if None in of:
            raise DatasetUnreadable(
                f"Row {of.index(None)} of {split} has no label.", "Every row needs one; without the column, none has."
            )
    if names is not None:
        return tuple(names)
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(str(value) for value in values))
    return numbered(np.array(ordered["train"], dtype=np.int64))


def _labels(ordered: dict[Split, list[int | str | None]], class_names: tuple[str, ...]) -> dict[Split, Labels]:
    number_of = {name: number for number, name in enumerate(class_names)}
    labels: dict[Split, Labels] = {}
    for split, of in ordered.items():
        numbers = [number_of.get(label, -1) if isinstance(label, str) else label for label in of]
        labels[split] = np.array(numbers, dtype=np.int64)
        if wrong := np.flatnonzero((labels[split] < 0) | (labels[split] >= len(class_names))).tolist():
            raise DatasetUnreadable(
                f"Row {wrong[0]} of {split} has the label {of[wrong[0]]!r}; there are {len(class_names)} classes.",
                "Leave out tables whose labels are hidden (-1)." if of[wrong[0]] == -1 else None,
            )
    require_all_classes(labels["train"], class_names)
    return labels


def _tables(
    path: Path, limits: Limits, archive: Callable[[], Iterator[Entry]] | None
) -> Iterator[tuple[str, _Columns, Iterator[_Row]]]:
    """Yield every table with its columns and rows, in the archive's order. A table in an archive is in memory whole."""
    arrow, parquet = _pyarrow()
    members = (
        ((str(entry.path), entry.read) for entry in archive() if _is_table(entry))
        if archive is not None
        else iter([(path.name, None)])
    )
    for name, read in members:
        try:
            table = parquet.ParquetFile(path if read is None else arrow.BufferReader(read()))
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise _broken(name if archive else "The table", error) from error
        shown = name if archive else "The table"
        columns = _columns(shown, table.schema_arrow, arrow)
        yield name, columns, _rows(shown, table, columns, limits, arrow)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise PyarrowMissing("The file is a Parquet table, and pyarrow is not installed.", _INSTALL) from error
    return pyarrow, parquet


def _columns(name: str, schema: Any, arrow: Any) -> _Columns:
    """Return the columns of pictures and of labels: by their usual names, else by their type if only one has it."""
    types = arrow.types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def is_image(kind: Any) -> bool:
        return is_bytes(kind) or (types.is_struct(kind) and any(is_bytes(f.type) for f in kind if f.name == "bytes"))

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_string(kind) or types.is_large_string(kind))

    def is_label(kind: Any) -> bool:
        return is_text(kind) or bool(types.is_integer(kind) and not types.is_uint64(kind))

    images = [field.name for field in schema if is_image(field.type)]
    labels = [field.name for field in schema if is_label(field.type) and field.name in LABEL_COLUMNS]
    image = next((column for column in IMAGE_COLUMNS if column in images), images[0] if len(images) == 1 else None)
    if image is None:
        raise DatasetUnreadable(
            f"{name} has no column of pictures; its columns are {', '.join(schema.names[:20])}.",
            f"The pictures are PNG or JPEG bytes in a column {' or '.join(IMAGE_COLUMNS[:2])}, as datasets.Image "
            "writes them, the labels in a column label.",
        )
    label = next((column for column in LABEL_COLUMNS if column in labels), None)
    unfit = next((field for field in schema if field.name in LABEL_COLUMNS and field.name != image), None)
    if label is None and unfit is not None:
        raise DatasetUnreadable(
            f"{name}: the column {unfit.name!r} is of the type {unfit.type}; labels are integers from 0, or text.",
            "Cast it, for example to int64, or rename it if it is no label.",
        )
    split = next((f.name for f in schema if is_text(f.type) and f.name.lower() in SPLIT_COLUMNS), None)
    other = [] if label else [field.name for field in schema if field.name != image and is_label(field.type)]
    return _Columns(image, label, _names(schema, label), split, other)


def _names(schema: Any, label: str | None) -> list[str] | None:
    """Return the names that Hugging Face's ClassLabel wrote into the table's notes."""
    try:
        notes = json.loads((schema.metadata or {})[b"huggingface"])
        names = notes["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and names and all(isinstance(one, str) for one in names) else None


def _rows(name: str, table: Any, columns: _Columns, limits: Limits, arrow: Any) -> Iterator[_Row]:
    """Yield the rows of one row group after the other. Its declared size is compared with the limits first."""
    number = 0
    wanted = [columns.image, *(column for column in (columns.label, columns.split) if column)]
    said: dict[Role, str] = {}
    try:
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).total_byte_size
            if size > limits.member_bytes * 4:
                raise DatasetUnreadable(
                    f"{name}: a row group unpacks to {size:,} bytes; the most is {limits.member_bytes * 4:,}.",
                    "Write the table with smaller row groups: to_parquet(..., row_group_size=1000).",
                )
            for batch in table.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                images = batch.column(columns.image)
                labels = [None] * len(batch) if columns.label is None else batch.column(columns.label).to_pylist()
                for value in [] if columns.split is None else batch.column(columns.split).unique().to_pylist():
                    if value is not None and (role := split_role(value)) is not None:
                        said[role[0]] = value
                if len(said) > 1:
                    raise DatasetUnreadable(
                        f"{name}: the column {columns.split!r} has several splits, such as "
                        f"{' and '.join(repr(value) for value in list(said.values())[:2])}.",
                        "Write a table for each, named train.parquet, test.parquet, …, and pack them in one .zip.",
                    )
                if arrow.types.is_struct(images.type):
                    images = images.field("bytes")
                for image, label in zip(images, labels, strict=True):
                    row = f"{name}, row {number}"
                    if not image.is_valid:
                        raise DatasetUnreadable(
                            f"{row} has no picture.",
                            "Only a path may be stored: embed the files (datasets.Image(), embed_external_files).",
                        )
                    yield _Row(image.as_py(), row, label)
                    number += 1
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> DatasetUnreadable:
    return DatasetUnreadable(
        f"{name} cannot be read as Parquet: {str(error).splitlines()[0].rstrip('.')}.", "Write it again."
    )
