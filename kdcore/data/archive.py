"""Reader of untrusted archives: members are read and checked one by one, and never unpacked to the disk.

Refused: paths outside the archive and absolute paths, links and devices, encryption, and bombs.
"""

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from base.errors import DatasetUnreadable

_ZIP = b"PK"
_GZIP = b"\x1f\x8b"
_READING_FAILED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Limits:
    """The largest unpacked content of an archive."""

    members: int = 5_000_000
    member_bytes: int = 256 << 20
    total_bytes: int = 256 << 30
    ratio: int = 100
    """The ratio of unpacked to packed size, from `ratio_from_bytes` on: images hardly compress, bombs do."""
    ratio_from_bytes: int = 1 << 30


LIMITS = Limits()


@dataclass(frozen=True)
class Entry:
    """One file or folder in an archive. `read` works until the next entry is taken."""

    path: PurePosixPath
    is_folder: bool
    read: Callable[[], bytes]


def entries(path: Path, limits: Limits, encoding: str | None = None) -> Iterator[Entry]:
    """Yield every member in the archive's own order, without files of operating systems (.DS_Store, __MACOSX).

    `encoding` is that of names in a .zip that are not marked as UTF-8.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
        members = _zip(path, limits, encoding) if start == _ZIP else _tar(path, limits, packed=start == _GZIP)
        for count, entry in enumerate(members):
            if count >= limits.members:
                raise DatasetUnreadable(f"The archive holds more than {limits.members:,} members.")
            if not _is_clutter(entry.path):
                yield entry
    except _READING_FAILED as error:
        raise DatasetUnreadable(
            f"The archive cannot be read: {error}.", "Send a whole .zip, .tar or .tar.gz without a password."
        ) from error


def _zip(path: Path, limits: Limits, encoding: str | None) -> Iterator[Entry]:
    budget = _Budget(path, limits)
    with zipfile.ZipFile(path, metadata_encoding=encoding) as archive:
        for info in archive.infolist():
            name = _safe(info.filename)
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_a_file(info.filename)
            budget.check(info.filename, info.file_size)
            budget.spend(info.file_size)
            yield Entry(name, info.is_dir(), lambda info=info: _read_zipped(archive, info))  # type: ignore[misc]


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{info.filename} cannot be unpacked: {error}.") from error


def _tar(path: Path, limits: Limits, packed: bool) -> Iterator[Entry]:
    budget = _Budget(path, limits)
    with (
        path.open("rb") as raw,
        gzip.open(raw) if packed else raw as unpacked,
        # A stream: each member is read once, in order, so that a packed archive is never unpacked twice.
        tarfile.open(fileobj=_Metered(unpacked, budget), mode="r|") as archive,
    ):
        for member in archive:
            name = _safe(member.name)
            if not (member.isreg() or member.isdir()):
                raise _not_a_file(member.name)
            budget.check(member.name, member.size)
            yield Entry(name, member.isdir(), lambda member=member: _read_tarred(archive, member))  # type: ignore[misc]


def _read_tarred(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "regular files have content"
    try:
        return file.read()
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{member.name} cannot be unpacked: {error}.") from error


class _Budget:
    """Counts unpacked bytes and compares them with the limits."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self._packed = path.stat().st_size
        self._unpacked = 0

    def check(self, name: str, size: int) -> None:
        if size > self._limits.member_bytes:
            raise DatasetUnreadable(f"{name} unpacks to {size:,} bytes; the most is {self._limits.member_bytes:,}.")

    def spend(self, size: int) -> None:
        self._unpacked += size
        if self._unpacked > self._limits.total_bytes:
            raise DatasetUnreadable(f"The archive unpacks to more than {self._limits.total_bytes:,} bytes.")
        if self._unpacked > max(self._limits.ratio_from_bytes, self._limits.ratio * self._packed):
            raise DatasetUnreadable(
                f"The archive unpacks to more than {self._limits.ratio} times its size: it looks like a bomb."
            )


class _Metered(io.RawIOBase):
    """A stream whose bytes are counted: a tar file does not give its size beforehand."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, budget: _Budget) -> None:
        self._stream = stream
        self._budget = budget

    def read(self, size: int = -1) -> bytes:
        blob = self._stream.read(size)
        self._budget.spend(len(blob))
        return blob


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")) or "\0" in name:
        raise DatasetUnreadable(
            f"The archive names a path outside itself: {name!r}.", "Pack it from within its folder."
        )
    return path


def _not_a_file(name: str) -> DatasetUnreadable:
    return DatasetUnreadable(
        f"{name} is a link or a device, not a file.",
        "Pack the files themselves (tar --dereference --hard-dereference).",
    )


def _is_clutter(path: PurePosixPath) -> bool:
    return not path.parts or any(
        part.startswith(".") or part in ("__MACOSX", "Thumbs.db", "desktop.ini") for part in path.parts
    )
