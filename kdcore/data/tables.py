"""Tables of file and label beside images: a `.csv` or `.tsv` with a header, or lines of a name and a label.

A table has a column of file names and one of labels (`FILE_COLUMNS`, `LABEL_COLUMNS`), and perhaps one of splits; two
columns without these names are read as file and label. Names are compared with the paths of the images from their
ends, with or without suffix, so that a table may stand anywhere. Kaggle's ImageNet (`ImageId,PredictionString`) is one.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import PurePosixPath
from typing import Protocol

from base.errors import DatasetUnreadable
from kdcore.catalog.facts import LeftOut
from kdcore.data.splits import Role, split_role

SUFFIXES = (".csv", ".tsv", ".txt")
MOST_TABLES = 50
MOST_BYTES = 64 << 20
"""Tables above either bound are not read."""
FILE_COLUMNS = (
    *("filename", "file", "filepath", "path", "image", "imageid", "imagename", "imagepath", "imagefile", "images"),
    *("img", "imgname", "imgpath", "id", "name"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "classname", "classid", "labelname", "category", "target", "breed", "species"),
    *("predictionstring", "diagnosis", "y"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "dataset", "datasplit")
"""Names of columns, in lower case without signs between words; the first that a table has counts."""
_AGREEING = 0.5
_WHOLE = 0.9
_NUMBERING_FROM = 10
_MOST_ALIKE = 100
"""Of more images of one name, only so many are compared with a row: a bound on the work for a hostile table."""


class Image(Protocol):
    """A file of an archive: its position and its path."""

    @property
    def ordinal(self) -> int: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Labelled:
    """What a table says of an image; `split` is a value of its column, or the table's own name if that is a split's."""

    label: str
    split: str | None
    table: str


@dataclass
class Tables:
    """The tables of an archive. `texts` yields path and content of each, one at a time."""

    texts: Callable[[], Iterator[tuple[PurePosixPath, bytes]]]
    useless: list[LeftOut] = field(default_factory=list)
    """Tables with a header whose names are those of no image."""

    def of(
        self,
        images: Sequence[Image],
        roles: Mapping[int, Role] | None = None,
        classes: Sequence[str] | None = None,
        folders: Mapping[int, str] | None = None,
    ) -> dict[int, Labelled]:
        """Return what the tables say of images, by position in the archive. Empty if no table names them.

        `roles`: the splits in whose folders the images are. `classes`: known names, of which a label may be the number.
        `folders`: the class folders of the images. Then a table can only add splits to them, and one that disagrees
        with the folders is refused. Raises DatasetUnreadable if two tables, or two rows, contradict each other.
        """
        index, found = _Index(images, roles or {}), dict[int, Labelled]()
        for path, content in self.texts():
            try:
                table = _parse(path, content)
                if folders is not None and not table.has_header:
                    continue
                rows, matched = index.match(table)
            except _NoTable:
                continue
            if not matched and table.has_header:
                why = "none of the names in it is that of an image here"
                self.useless.append(LeftOut(what=str(path), count=rows, why=why))
            if len(matched) < _AGREEING * min(rows, len(images)) or _numbers_its_rows(table, matched):
                continue
            named = matched if classes is None else _named(matched, classes)
            for ordinal, one in named.items():
                earlier = found.setdefault(ordinal, one)
                if earlier.label != one.label:
                    raise _contradiction(index.names[ordinal], earlier, one)
        return found if folders is None else _splits_of_folders(found, folders, index.names)


class _NoTable(Exception):
    """A text is no table of files and labels."""


@dataclass(frozen=True)
class _Table:
    path: PurePosixPath
    has_header: bool
    rows: Iterator[tuple[str, str, str | None]]
    """File, label and split, one row at a time. Raises _NoTable at a row that is none."""


def _parse(path: PurePosixPath, content: bytes) -> _Table:
    """Return a table, of which only the first row has been read. Raises _NoTable."""
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _NoTable from error
    records = _records(text)
    first = next(records, None)
    if first is None:
        raise _NoTable
    header = [re.sub(r"[\W_]", "", cell.lower()) for cell in first]
    file, label, split = (_column(header, names) for names in (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS))
    if file is None or label is None:
        return _Table(path, False, _pairs(chain([first], records)))
    return _Table(path, True, _by_columns(records, file, label, split, header[label] == "predictionstring"))


def _records(text: str) -> Iterator[list[str]]:
    filled = (line for line in io.StringIO(text) if line.strip())
    first = next(filled, "")
    delimiter = max(",;\t", key=first.count)
    lines = chain([first] if first else [], filled)
    if delimiter not in first:
        yield from (line.rsplit(maxsplit=1) for line in lines)
        return
    try:
        yield from csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise _NoTable from error


def _pairs(records: Iterable[Sequence[str]]) -> Iterator[tuple[str, str, str | None]]:
    for record in records:
        if len(record) != 2:
            raise _NoTable
        yield record[0], _plain(record[1]), None


def _by_columns(
    records: Iterable[Sequence[str]], file: int, label: int, split: int | None, first_word: bool
) -> Iterator[tuple[str, str, str | None]]:
    """Yield the rows that have a label; of `first_word` labels only the first word counts."""
    width = max(file, label, split or 0) + 1
    for record in records:
        if len(record) >= width and record[label].strip():
            name = record[label].split()[0] if first_word else record[label]
            yield record[file], _plain(name), None if split is None else record[split].strip()


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


class _Index:
    """Images by the ends of their paths."""

    def __init__(self, images: Sequence[Image], roles: Mapping[int, Role]) -> None:
        self.names = {image.ordinal: image.name for image in images}
        self._roles = roles
        self._by_name: dict[str, list[int]] = {}
        for image in images:
            path = PurePosixPath(image.name)
            for name in {path.name, path.stem}:
                for key in (name, f"{path.parent.name}/{name}"):
                    self._by_name.setdefault(key, []).append(image.ordinal)

    def match(self, table: _Table) -> tuple[int, dict[int, Labelled]]:
        """Return the number of rows, and what they say of the images that they name."""
        own = split_role(table.path.stem)
        matched: dict[int, Labelled] = {}
        rows = 0
        for file, label, split in table.rows:
            rows += 1
            said = split or (table.path.stem if own is not None and not own[1] else None)
            role = split_role(said) if said else None
            ordinal = self._find(file, table.path, role[0] if role else None)
            if ordinal is None:
                continue
            one = Labelled(label, said, str(table.path))
            if matched.setdefault(ordinal, one).label != label:
                raise _contradiction(self.names[ordinal], matched[ordinal], one)
        return rows, matched

    def _find(self, file: str, table: PurePosixPath, role: Role | None) -> int | None:
        parts = [part for part in _plain(file.replace("\\", "/")).split("/") if part not in ("", ".")]
        if not parts:
            return None
        in_folders = [found[0] for part in parts[:-1] if (found := split_role(part)) is not None and not found[1]]
        role = in_folders[-1] if in_folders else role
        alike = self._by_name.get("/".join(parts[-2:])) or self._by_name.get(parts[-1], [])
        fitting = [one for one in alike[:_MOST_ALIKE] if role is None or self._roles.get(one, role) == role]
        if len(fitting) > 1:
            tails = [_tail(parts[:-1], self.names[ordinal]) for ordinal in fitting]
            fitting = [one for one, tail in zip(fitting, tails, strict=True) if tail == max(tails)]
        if len(fitting) > 1:
            raise DatasetUnreadable(
                f"{table} names {file!r}, which stands for {self.names[fitting[0]]} and {self.names[fitting[1]]}.",
                "Write the paths of the images into the table.",
            )
        return fitting[0] if fitting else None


def _tail(folders: Sequence[str], name: str) -> int:
    """Return how many of the last folders are the same."""
    own = PurePosixPath(name).parts[:-1]
    pairs = zip(reversed(folders), reversed(own), strict=False)
    return next((count for count, (one, other) in enumerate(pairs) if one != other), min(len(folders), len(own)))


def _numbers_its_rows(table: _Table, matched: Mapping[int, Labelled]) -> bool:
    """Return True if the second column is a number of its own for every image, as in ImageNet's `ImageSets`."""
    distinct = len({one.label for one in matched.values()})
    return not table.has_header and len(matched) > _NUMBERING_FROM and distinct == len(matched)


def _named(matched: Mapping[int, Labelled], classes: Sequence[str]) -> Mapping[int, Labelled]:
    """Return the labels as names of classes; empty if they are neither names nor numbers of classes."""
    labels = {one.label for one in matched.values()}
    if labels & set(classes):
        return matched
    if not all(re.fullmatch(r"\d{1,9}", label) and int(label) < len(classes) for label in labels):
        return {}
    return {at: Labelled(classes[int(one.label)], one.split, one.table) for at, one in matched.items()}


def _splits_of_folders(
    found: Mapping[int, Labelled], folders: Mapping[int, str], names: Mapping[int, str]
) -> dict[int, Labelled]:
    """Return images with the classes of their folders and the splits of a table; empty if the table has no splits."""
    if len(found) < _WHOLE * len(names) or len(folders) < len(names):
        return {}
    folder_of: dict[str, str] = {}
    label_of: dict[str, str] = {}
    for ordinal, one in found.items():
        folder = folders[ordinal]
        if folder_of.setdefault(one.label, folder) != folder or label_of.setdefault(folder, one.label) != one.label:
            raise DatasetUnreadable(
                f"{one.table} sorts the images into other classes than their folders do: it has {names[ordinal]} in "
                f"{one.label!r}.",
                "Leave the table out to read the folders, or put all images into one folder to read the table.",
            )
    if len({one.split for one in found.values()}) < 2:
        return {}
    return {ordinal: Labelled(folders[ordinal], one.split, one.table) for ordinal, one in found.items()}


def _contradiction(name: str, one: Labelled, other: Labelled) -> DatasetUnreadable:
    where = one.table if one.table == other.table else f"{one.table} and {other.table}"
    return DatasetUnreadable(
        f"{where}: {name} has the label {one.label!r} and the label {other.label!r}.",
        "Each image has one label; leave out what is wrong.",
    )
