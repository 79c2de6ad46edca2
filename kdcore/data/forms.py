"""The form of a data set's file, found by its content and not by its name; docs/data.md lists all of them.

What is not read is named as what it is, with the forms that are.
"""

import gzip
import tarfile
import zipfile
import zlib
from itertools import islice
from pathlib import Path

from base.errors import DatasetUnreadable
from base.file_kinds import HEAD_BYTES, PARQUET, WEBDATASET, FileKind, is_idx, kind_of, kind_of_members
from base.zip_files import members
from kdcore.data.archive import LIMITS, entries
from kdcore.data.arrays import open_arrays
from kdcore.data.decoding import Source
from kdcore.data.folders import open_folders
from kdcore.data.image_files import SUFFIXES
from kdcore.data.parquet import open_parquet
from kdcore.data.published import holds_cifar, holds_idx, open_cifar, open_idx, open_idx_file
from kdcore.spec import DataOptions

READ = (
    "Arrays in a .npz, and class folders of images in a .zip, .tar or .tar.gz, are read; docs/data.md lists all forms."
)
_MOST_NAMES = 100_000
"""Names of an archive by which its form is told: none of the forms that are no pictures has so many."""
_FIRST_FILES = 64
"""The number of files of a tar, whose names are not in one place, that tell its form."""


def open_file(path: Path, options: DataOptions | None = None) -> Source:
    """Open a file of any form that is read. Raises DatasetUnreadable, which says what another file is."""
    options = options or DataOptions()
    if not path.is_file():
        raise DatasetUnreadable(f"{path.name} is not a file.", "Pack a folder into a .zip or .tar.gz first.")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        raise DatasetUnreadable("The file is empty.", READ)
    if head.startswith(b"PK"):
        return _open_zip(path, options)
    packed = head.startswith(b"\x1f\x8b")
    if packed:
        head = _unpacked(path)
    if _is_tar(head):
        return _open_archive(path, options, _first_names(path, options))
    if is_idx(head):
        return open_idx_file(path, options)
    kind = kind_of(head)
    if kind is PARQUET and not packed:
        return open_parquet(path, options)
    raise _not_read(kind, "a gzip file of " if packed else "", head)


def _open_zip(path: Path, options: DataOptions) -> Source:
    try:
        with path.open("rb") as file:
            found = (member.filename for member in islice(members(file.fileno()), _MOST_NAMES))
            names = [name for name in found if not name.endswith("/")]
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError):
        names = []
    if any(name.endswith(".npy") and "/" not in name for name in names):
        return open_arrays(path, options)
    return _open_archive(path, options, names)


def _open_archive(path: Path, options: DataOptions, names: list[str]) -> Source:
    if any(name.lower().endswith(SUFFIXES) for name in names):
        if any(name.endswith(".cls") for name in names):
            raise _not_read(WEBDATASET)
        return open_folders(path, options)
    if holds_idx(names):
        return open_idx(path, options)
    if holds_cifar(names):
        return open_cifar(path, options)
    if any(name.endswith(".parquet") for name in names):
        return open_parquet(path, options, archive=True)
    try:
        return open_folders(path, options)
    except DatasetUnreadable as error:
        kind = kind_of_members(names)
        if kind is None or not str(error).startswith("The archive holds no images"):
            raise
        raise _not_read(kind, "an archive with ") from error


def _first_names(path: Path, options: DataOptions) -> list[str]:
    """Return the names of the first files of a tar."""
    return [
        str(entry.path)
        for entry in islice((one for one in entries(path, LIMITS, options.encoding) if not one.is_folder), _FIRST_FILES)
    ]


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(path) as file:
            return file.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetUnreadable(f"The gzip file cannot be unpacked: {error}.", "Download or pack it again.") from error


def _is_tar(head: bytes) -> bool:
    """Return True if the first block is a tar member's, which has a checksum."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _not_read(kind: FileKind | None, packing: str = "", head: bytes = b"") -> DatasetUnreadable:
    if kind is None:
        words = f"of no kind that is known: {'inside the gzip ' if packing else ''}it begins with {head[:8].hex(' ')}"
        return DatasetUnreadable(f"The file is {words}.", READ)
    return DatasetUnreadable(
        f"The file is {packing}{kind.words}. That is not read as a data set.", f"{kind.as_data} {READ}".strip()
    )
