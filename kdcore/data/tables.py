"""Tables of file and label beside images: a `.csv` or `.tsv` with a header, or lines of a name and a label.

A table has a column of file names and one of labels (`FILE_COLUMNS`, `LABEL_COLUMNS`), and perhaps one of splits; two
columns without these names are read as file and label. Names are compared with the paths of the images from their
ends, with or without suffix, so that a table may stand anywhere. A name that is that of no image stands for the one
image whose name differs in case or in a picture's suffix only, if there is one. Kaggle's ImageNet
(`ImageId,PredictionString`) is such a table.
"""

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol, TypeVar

from base.errors import DatasetUnreadable
from kdcore.catalog.facts import LeftOut
from kdcore.data.splits import Role, split_role

SUFFIXES = (".csv", ".tsv", ".txt")
MOST_TABLES = 50
MOST_BYTES = 64 << 20
"""Tables above either bound are not read."""
FILE_COLUMNS = (
    *("filename", "file", "filepath", "path", "image", "imageid", "imagename", "imagepath", "imagefile", "images"),
    *("filenames", "files", "filepaths", "paths", "imagefilename", "imagefilepath", "imagenames", "imagepaths"),
    *("img", "imgname", "imgpath", "id", "name"),
)
LABEL_COLUMNS = (
    *("label", "labels", "class", "classname", "classid", "labelname", "category", "target", "breed", "species"),
    *("predictionstring", "diagnosis", "y", "emotion"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "dataset", "datasplit", "usage")
"""Names of columns, in lower case without signs between words; the first that a table has counts. A column of another
name is one of splits if it has names of splits only, among them two."""
_FOLD_COLUMNS = ("fold", "folds", "kfold", "foldid", "cvfold", "foldnumber")
"""Columns of parts for a cross-validation, which are no splits."""
_NO_LABEL = ("", "nan", "<na>", "#n/a")
"""What stands in a table, in lower case, for a label that is not there."""
_FLAGS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("istrain", "istraining", "istrainingimage"), ("test", "train")),
    **dict.fromkeys(("istest", "istesting"), ("train", "test")),
}
"""Names of columns of 0 and 1, or of false and true, and what these say."""
_NUMBERED, _FLAGGED = "images.txt", "train_test_split.txt"
"""The files of CUB-200-2011 that number the images, and that say by number which are training images (1)."""
_BOOLEANS = {"0": 0, "1": 1, "false": 0, "true": 1}
_PICTURE_SUFFIX = re.compile(r"\.(?:jpe?g|jfif|png|bmp|gif|tiff?|webp|p[bgpn]m)$")
_AGREEING = 0.5
_WHOLE = 0.9
_NUMBERING_FROM = 10
_MOST_ROWS = 10
"""Of a list of a split, only so many rows for each image are read: a bound on the work for a hostile one."""
_MOST_SPLITS = 20
"""The most values of a column that says splits."""
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
    unread: list[LeftOut] = field(default_factory=list)
    """Files named like tables that are none that is read."""
    ignored: list[LeftOut] = field(default_factory=list)
    """Columns of tables that are read, that might be splits and are not used."""
    without_label: dict[int, str] = field(default_factory=dict)
    """Images, by position in the archive, with the table in which their label is empty, or stands for none (`nan`)."""
    respelled: dict[int, str] = field(default_factory=dict)
    """Images, by position in the archive, with the name in a table that differs from theirs in case or suffix."""

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
        known = frozenset(classes or ()) | frozenset((folders or {}).values())
        for path, content in self.texts():
            try:
                table = _parse(path, content, frozenset(classes or ()))
                if folders is not None and not table.has_header:
                    continue
                read = index.match(table, known)
                rows, matched = read.rows, read.matched
            except _NoTable as error:
                if path.suffix.lower() != ".txt":
                    self.unread.append(LeftOut(what=str(path), count=1, why=str(error) or _UNKNOWN_COLUMNS))
                continue
            if not matched and table.has_header:
                why = "none of the names in it is that of an image here"
                self.useless.append(LeftOut(what=str(path), count=rows, why=why))
            if len(matched) < _AGREEING * min(rows, len(images)) or _numbers_its_rows(table, matched):
                continue
            self.ignored += [
                LeftOut(what=f"the column {name!r} of {path}", count=rows, why=_FOLDS) for name in table.folds
            ]
            self._take(read, str(path))
            named = matched if classes is None else _named(matched, classes)
            for ordinal, one in named.items():
                earlier = found.setdefault(ordinal, one)
                if earlier.label != one.label:
                    raise _contradiction(index.names[ordinal], earlier, one)
        return found if folders is None else _splits_of_folders(found, folders, index.names)

    def lists(self, images: Sequence[Image], folders: Mapping[int, str]) -> dict[int, Labelled]:
        """Return images with the classes of their folders and the splits of lists, by position in the archive.

        Read are lists of paths named after splits (train.txt and test.txt), a table of file and split, and the
        train_test_split.txt of CUB-200-2011. Empty unless they name nearly all images, each in one split.
        """
        index, found = _Index(images, {}), dict[int, Labelled]()
        respelled: dict[int, tuple[str, Labelled] | None] = {}
        most = _MOST_ROWS * (len(images) + 1)
        names: list[str] = []
        numbers: dict[str, str] = {}
        flags: dict[str, str] = {}
        for path, content in self.texts():
            if path.name in (_NUMBERED, _FLAGGED):
                (numbers if path.name == _NUMBERED else flags).update(_two_words(content, most))
            rows: Iterable[tuple[str, str]] = _listed(path, content)
            if path.name == _FLAGGED:
                known = ((numbers[number], flag) for number, flag in flags.items() if number in numbers)
                rows = ((file, "train" if flag == "1" else "test") for file, flag in known)
            matched: list[tuple[int, str]] = []
            try:
                for file, said in islice(rows, most):
                    if (at := index.find(file, path)) is not None:
                        matched.append((at, said))
                    elif (at := index.find_respelled(file)) is not None:
                        _note(respelled, at, (file, Labelled(folders[at], said, str(path))))
            except DatasetUnreadable as error:
                self.useless.append(LeftOut(what=str(path), count=1, why=f"{error} Its splits are not read"))
                return {}
            names += [str(path)] if matched else []
            for ordinal, said in matched:
                earlier = found.setdefault(ordinal, Labelled(folders[ordinal], said, str(path)))
                if _role_of(earlier.split) != _role_of(said):
                    why = f"{earlier.table} has {index.names[ordinal]} in another split, so the splits are not read"
                    self.useless.append(LeftOut(what=str(path), count=len(matched), why=why))
                    return {}
        added = {at: noted for at, noted in respelled.items() if noted is not None and at not in found}
        found |= {at: one for at, (_, one) in added.items()}
        roles = {_role_of(one.split) for one in found.values()}
        if len(found) >= _WHOLE * len(images) and len(roles) > 1 and "train" in roles:
            self.respelled.update({at: file for at, (file, _) in added.items()})
            return found
        if len(roles) > 1:
            why = f"they name {len(found):,} of {len(images):,} images, so their splits are not read"
            self.useless.append(LeftOut(what=" and ".join(names[:3]), count=len(found), why=why))
        return {}

    def _take(self, read: "_Read", table: str) -> None:
        self.without_label.update(dict.fromkeys(read.empty, table))
        self.respelled.update(read.respelled)


class _NoTable(Exception):
    """A text is no table of files and labels. The message says why, if its columns are not the reason."""


_FOLDS = "parts for a cross-validation are no splits: write train, val or test into a column split"
_UNKNOWN_COLUMNS = "no labels are read from it: it needs one column of files (filename) and one of labels (label)"


@dataclass(frozen=True)
class _Table:
    path: PurePosixPath
    has_header: bool
    rows: Iterator[tuple[str, str, str | None]]
    """File, label and split, one row at a time. Raises _NoTable at a row that is none."""
    folds: Sequence[str] = ()
    """The names of its columns of folds, if it has no column of splits."""


def _parse(path: PurePosixPath, content: bytes, classes: Collection[str]) -> _Table:
    """Return a table, of which only the first row has been read. `classes` are known names. Raises _NoTable."""
    text = _text(content)
    records = _records(text)
    first = next(records, None)
    if first is None:
        raise _NoTable
    header = _header(first)
    file, label = _column(header, FILE_COLUMNS), _column(header, LABEL_COLUMNS)
    if file is None or label is None:
        return _Table(path, False, _pairs(chain([first], records), classes))
    splits = _split_column(header, text, {file, label})
    folds = [] if splits else [cell for cell, plain in zip(first, header, strict=True) if plain in _FOLD_COLUMNS]
    rows = _by_columns(records, file, label, splits, header[label] == "predictionstring")
    return _Table(path, True, rows, folds)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _NoTable("it is not UTF-8, and not read: write it in that encoding") from error


def _header(first: Iterable[str]) -> list[str]:
    return [re.sub(r"[\W_]", "", cell.lower()) for cell in first]


def _listed(path: PurePosixPath, content: bytes) -> Iterator[tuple[str, str]]:
    """Yield files and their splits: of a list named after a split, or of a table with columns for both."""
    try:
        text = _text(content)
        first = next(_records(text), None)
        if first is None:
            return
        header, file = _header(first), _column(_header(first), FILE_COLUMNS)
        splits = None if file is None else _split_column(header, text, {file})
        if file is not None and splits is not None:
            rows = _by_columns(_records(text), file, splits.column, splits, False)
            yield from ((name, said) for name, _, said in islice(rows, 1, None) if said and _role_of(said))
        elif _role_of(path.stem) and path.suffix.lower() == ".txt":
            yield from ((line.strip(), path.stem) for line in io.StringIO(text) if line.strip())
    except _NoTable:
        return


def _two_words(content: bytes, most: int) -> dict[str, str]:
    """Return the first word of each of so many lines with the rest."""
    pairs = (line.split(maxsplit=1) for line in islice(io.StringIO(content.decode("utf-8", "replace")), most))
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _role_of(said: str | None) -> Role | None:
    role = split_role(said) if said else None
    return role[0] if role is not None and not role[1] else None


def _split_column(header: Sequence[str], text: str, taken: set[int]) -> "_Splits | None":
    named = _column(header, SPLIT_COLUMNS)
    return _Splits(named, {}) if named is not None else _splits_by_values(header, _records(text), taken)


class _Splits(NamedTuple):
    """The column of splits, and what its values stand for if they are not names of splits themselves."""

    column: int
    meaning: Mapping[str, str]


def _splits_by_values(header: Sequence[str], records: Iterator[list[str]], taken: set[int]) -> _Splits | None:
    """Return a column of names of splits, or of flags such as `is_training`, whatever its name is."""
    seen: dict[int, set[str]] = {column: set() for column in range(len(header)) if column not in taken}
    next(records, None)
    for record in records:
        for column in list(seen):
            value = record[column].strip().lower() if column < len(record) else ""
            if not value or value in seen[column]:
                continue
            role = split_role(value) if len(seen[column]) < _MOST_SPLITS else None
            if (role is not None and not role[1]) or (header[column] in _FLAGS and value in _BOOLEANS):
                seen[column].add(value)
            else:
                del seen[column]
        if not seen:
            return None
    for column, values in seen.items():
        if header[column] in _FLAGS and values and values <= _BOOLEANS.keys():
            return _Splits(column, {value: _FLAGS[header[column]][_BOOLEANS[value]] for value in values})
        roles = {role[0] for value in values if (role := split_role(value)) is not None}
        if len(roles) > 1 and "train" in roles:
            return _Splits(column, {})
    return None


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


def _pairs(records: Iterable[Sequence[str]], classes: Collection[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield rows of file and label; more columns (Tiny ImageNet's boxes) only behind the name of a known class."""
    for record in records:
        if len(record) != 2 and not (len(record) > 2 and record[1] in classes):
            raise _NoTable
        yield record[0], _plain(record[1]), None


def _by_columns(
    records: Iterable[Sequence[str]], file: int, label: int, splits: _Splits | None, first_word: bool
) -> Iterator[tuple[str, str, str | None]]:
    """Yield the rows that are long enough; of `first_word` labels only the first word counts."""
    width = max(file, label, splits.column if splits else 0) + 1
    for record in records:
        if len(record) >= width:
            name = next(iter(record[label].split()), "") if first_word else record[label]
            said = None if splits is None else record[splits.column].strip()
            yield record[file], _plain(name), splits.meaning.get(said.lower(), said) if splits and said else said


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


N = TypeVar("N")


def _note(noted: dict[int, tuple[str, N] | None], at: int, one: tuple[str, N]) -> None:
    """Note which name in a table stands for an image, and what it says; None if several names do, or if they differ."""
    noted[at] = one if noted.get(at, one) == one else None


class _Read(NamedTuple):
    """What a table says of the images that it names."""

    rows: int
    """Its rows with a label."""
    matched: dict[int, Labelled]
    empty: set[int]
    """Images whose label is empty."""
    respelled: dict[int, str]
    """Those whose names differ in case or suffix, with the table's."""


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

    @cached_property
    def _by_similar(self) -> dict[str, list[int]]:
        """The images by their names in lower case without a picture's suffix, alone and behind their folder."""
        found: dict[str, list[int]] = {}
        for ordinal, path in self.names.items():
            for key in _similar(path.split("/")):
                found.setdefault(key, []).append(ordinal)
        return found

    def match(self, table: _Table, known: Collection[str]) -> _Read:
        """Return what a table says of images. A label such as `nan` is one if it is a `known` class."""
        own = split_role(table.path.stem)
        matched: dict[int, Labelled] = {}
        empty: set[int] = set()
        respelled: dict[int, tuple[str, Labelled | None] | None] = {}
        rows = 0
        for file, label, split in table.rows:
            is_empty = label.lower() in _NO_LABEL and label not in known
            rows += not is_empty
            said = split or (table.path.stem if own is not None and not own[1] else None)
            role = split_role(said) if said else None
            one = None if is_empty else Labelled(label, said, str(table.path))
            ordinal = self.find(file, table.path, role[0] if role else None)
            if ordinal is None:
                similar = self.find_respelled(file, role[0] if role else None)
                if similar is not None:
                    _note(respelled, similar, (file, one))
            elif one is None:
                empty.add(ordinal)
            elif matched.setdefault(ordinal, one).label != label:
                raise _contradiction(self.names[ordinal], matched[ordinal], one)
        added = {
            at: noted for at, noted in respelled.items() if noted is not None and at not in matched and at not in empty
        }
        matched |= {at: one for at, (_, one) in added.items() if one is not None}
        empty |= {at for at, (_, one) in added.items() if one is None}
        return _Read(rows, matched, empty - matched.keys(), {at: file for at, (file, _) in added.items()})

    def find(self, file: str, table: PurePosixPath, role: Role | None = None) -> int | None:
        """Return the position of the image that a table names, or None. Raises DatasetUnreadable if there are two."""
        parts = _parts(file)
        if not parts:
            return None
        alike = self._by_name.get("/".join(parts[-2:])) or self._by_name.get(parts[-1], [])
        fitting = self._of_role(alike, parts, role)
        if len(fitting) > 1:
            tails = [_tail(parts[:-1], self.names[ordinal]) for ordinal in fitting]
            fitting = [one for one, tail in zip(fitting, tails, strict=True) if tail == max(tails)]
        if len(fitting) > 1:
            raise DatasetUnreadable(
                f"{table} names {file!r}, which stands for {self.names[fitting[0]]} and {self.names[fitting[1]]}.",
                "Write the paths of the images into the table.",
            )
        return fitting[0] if fitting else None

    def find_respelled(self, file: str, role: Role | None = None) -> int | None:
        """Return the position of the one image whose name differs in case or suffix only; None if there are several."""
        parts = _parts(file)
        alone, *behind = _similar(parts) if parts else [""]
        alike = next((found for key in behind if (found := self._by_similar.get(key))), None)
        fitting = self._of_role(alike or self._by_similar.get(alone, []), parts, role)
        return fitting[0] if len(fitting) == 1 else None

    def _of_role(self, alike: Sequence[int], parts: Sequence[str], role: Role | None) -> list[int]:
        """Return the images in the split that is named in the path, or given."""
        in_folders = [found[0] for part in parts[:-1] if (found := split_role(part)) is not None and not found[1]]
        role = in_folders[-1] if in_folders else role
        return [one for one in alike[:_MOST_ALIKE] if role is None or self._roles.get(one, role) == role]


def _parts(file: str) -> list[str]:
    """Return the folders and the name in a path that a table has."""
    return [part for part in _plain(file.replace("\\", "/")).split("/") if part not in ("", ".")]


def _similar(parts: Sequence[str]) -> list[str]:
    """Return a file's name in lower case without a picture's suffix, and the same behind its folder if it has one."""
    name = _PICTURE_SUFFIX.sub("", parts[-1].casefold())
    return [name, f"{parts[-2].casefold()}/{name}"] if len(parts) > 1 else [name]


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
