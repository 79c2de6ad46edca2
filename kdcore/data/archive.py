"""Reader of untrusted archives: members are read and checked one by one, and never unpacked to the disk.

Refused: paths outside the archive and absolute paths, links and devices, encryption, and bombs. Names are UTF-8, with
or without a zip's flag for it, or in the encoding that is given; their parts are brought to one Unicode form (NFC),
without blanks at their ends.
"""

import gzip
import io
import os
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

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
    ValueError,
)


@dataclass(frozen=True)
class Limits:
    """The largest unpacked content of an archive."""

    members: int = 5_000_000
    member_bytes: int = 256 << 20
    total_bytes: int = 256 << 30
    depth: int = 64
    """Folders inside of each other."""
    ratio: int = 100
    """The ratio of unpacked to packed size, from `ratio_from_bytes` on: images hardly compress, bombs do."""
    ratio_from_bytes: int = 1 << 30


LIMITS = Limits()


class Place(NamedTuple):
    """Where one file's bytes are, so that they can be read again without what is before them."""

    start: int
    packed: int
    """Bytes from `start` on."""
    size: int
    """Bytes when unpacked."""
    deflated: bool = False


def read_at(descriptor: int, place: Place) -> bytes:
    """Return the bytes at a place of an open file; others if the file has changed. Threads may share the descriptor."""
    blob = os.pread(descriptor, place.packed, place.start)
    if not place.deflated:
        return blob
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(blob, place.size)
    except zlib.error:
        return b""


@dataclass(frozen=True)
class Entry:
    """One file or folder in an archive. `read` and `place` work until the next entry is taken."""

    path: PurePosixPath
    is_folder: bool
    read: Callable[[], bytes]
    stored: str
    """The name before its Unicode form and blanks were made one."""
    size: int
    """Bytes, as the archive says."""
    place: Callable[[], Place | None]
    """Returns None if the bytes can be reached only by unpacking what is before them, or only by a library."""


def entries(path: Path, limits: Limits, encoding: str | None = None) -> Iterator[Entry]:
    """Yield every member in the archive's own order, without files of operating systems (.DS_Store, __MACOSX).

    `encoding` is that of the names, as Python calls it (gbk, cp866). None: they must be UTF-8.
    """
    try:
        "".encode(encoding or "utf-8")
    except LookupError as error:
        raise DatasetUnreadable(
            f"There is no text encoding {encoding!r} (field encoding).",
            "Known are gbk, shift_jis, cp866, cp437, latin-1.",
            "encoding",
        ) from error
    try:
        with path.open("rb") as file:
            start = file.read(2)
        members = _zip(path, limits, encoding) if start == _ZIP else _tar(path, limits, encoding, packed=start == _GZIP)
        for count, entry in enumerate(members):
            if count >= limits.members:
                raise DatasetUnreadable(f"The archive holds more than {limits.members:,} members.")
            if len(entry.path.parts) > limits.depth:
                raise DatasetUnreadable(f"The archive holds more than {limits.depth} folders inside of each other.")
            if not _is_clutter(entry.path):
                yield entry
    except _READING_FAILED as error:
        raise DatasetUnreadable(
            f"The archive cannot be read: {error}.", "Send a whole .zip, .tar or .tar.gz without a password."
        ) from error


def _zip(path: Path, limits: Limits, encoding: str | None) -> Iterator[Entry]:
    budget = _Budget(path, limits)
    with path.open("rb") as raw, zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            stored = _zipped_name(info, encoding)
            name = _safe(stored)
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_a_file(str(name))
            budget.check(str(name), info.file_size)
            budget.spend(info.file_size)
            read = partial(_read_zipped, archive, info, name)
            place = partial(place_zipped, raw.fileno(), info)
            yield Entry(name, stored.endswith("/"), read, stored, info.file_size, place)


_UTF8_FLAG = 0x800


def _zipped_name(info: zipfile.ZipInfo, encoding: str | None) -> str:
    """Return a member's name. Python decodes names without the UTF-8 flag as cp437: that gives their bytes again."""
    if info.flag_bits & _UTF8_FLAG or info.filename != info.orig_filename.partition("\0")[0]:
        return info.filename  # Flagged, or taken from the field for Unicode names by newer Pythons.
    return _decoded(info.filename.encode("cp437"), encoding)


def _decoded(name: bytes, encoding: str | None) -> str:
    try:
        return name.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        shown = name.decode("ascii", "backslashreplace")
        if encoding is not None:
            raise DatasetUnreadable(
                f"The names in this archive are not in the encoding {encoding!r}: {shown}.",
                "Give the one in which they were written, or none for UTF-8 (field encoding).",
            ) from error
        raise DatasetUnreadable(
            f"The names in this archive are in an unknown encoding, not UTF-8: {shown}.",
            "Give it with the field encoding (gbk, shift_jis, cp866, cp437, …), or pack the files with names in UTF-8.",
        ) from error


def _read_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: PurePosixPath) -> bytes:
    try:
        return archive.read(info)
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{name} cannot be unpacked: {error}.") from error


_LOCAL_HEADER = struct.Struct("<26xHH")
_MOST_OVERHEAD = 1024
"""Bytes by which a deflated file of a few bytes may be larger than the file."""


def place_zipped(descriptor: int, info: zipfile.ZipInfo) -> Place | None:
    """Return where a zip's member is: behind its local header, which ends with a name and an extra field."""
    deflated = info.compress_type == zipfile.ZIP_DEFLATED
    # The packed size is read in one piece, and it is only what the archive says.
    most = info.file_size + (info.file_size >> 8) + _MOST_OVERHEAD if deflated else info.file_size
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.compress_size > most:
        return None
    header = os.pread(descriptor, _LOCAL_HEADER.size, info.header_offset)
    if len(header) < _LOCAL_HEADER.size:
        return None
    start = info.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
    return Place(start, info.compress_size, info.file_size, deflated)


def _tar(path: Path, limits: Limits, encoding: str | None, packed: bool) -> Iterator[Entry]:
    budget = _Budget(path, limits)
    with (
        path.open("rb") as raw,
        gzip.open(raw) if packed else raw as unpacked,
        # A stream: each member is read once, in order, so that a packed archive is never unpacked twice.
        tarfile.open(fileobj=_Metered(unpacked, budget), mode="r|", encoding="utf-8") as archive,
    ):
        for member in archive:
            stored = _tarred_name(member, encoding)
            name = _safe(stored)
            if not (member.isreg() or member.isdir()):
                raise _not_a_file(str(name))
            budget.check(str(name), member.size)
            read = partial(_read_tarred, archive, member, name)
            yield Entry(name, member.isdir(), read, stored, member.size, partial(_place_tarred, member, packed))


def _place_tarred(member: tarfile.TarInfo, packed: bool) -> Place | None:
    return None if packed or member.issparse() else Place(member.offset_data, member.size, member.size)


def _tarred_name(member: tarfile.TarInfo, encoding: str | None) -> str:
    """Return a member's name. Names in pax headers are always UTF-8; of others, bytes that are not are escapes."""
    if "path" in member.pax_headers:
        return member.name
    return _decoded(member.name.encode("utf-8", "surrogateescape"), encoding)


def _read_tarred(archive: tarfile.TarFile, member: tarfile.TarInfo, name: PurePosixPath) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "regular files have content"
    try:
        return file.read()
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{name} cannot be unpacked: {error}.") from error


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
    """Return the path with every part in one Unicode form, without blanks at its end."""
    plain = unicodedata.normalize("NFC", name.replace("\\", "/"))
    path = PurePosixPath("/".join(part.rstrip() or part for part in plain.split("/")))
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
