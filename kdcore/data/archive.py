"""Reader of untrusted archives: members are read and checked one by one, and never unpacked to the disk.

Refused: paths outside the archive and absolute paths, links and devices, encryption, and bombs. Names are UTF-8, with
or without a zip's flag for it, or in the encoding that is given; their parts are brought to one Unicode form (NFC),
without blanks at their ends.
"""

import gzip
import io
import os
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, Protocol

from base.errors import DatasetUnreadable
from base.zip_files import ZipMember, members, read_member, start_of

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
    pixels_a_byte: int = 500
    """Pixels of all pictures for each byte of the file, from `pixels_from` on. Ordinary pictures have one to ten, scans
    of black and white some two hundred, a large PNG of nothing 8,000 for each byte and, in a zip, 300,000."""
    pixels_from: int = 1 << 32
    broken: int = 1_000
    """Files named as pictures that are none, if they are more than the others: then the rest is not read."""
    no_pictures: int = 50_000
    """Files of any name among which there is no picture: then the rest is not read."""
    arrays: int = 1_000
    """Arrays of an .npz."""
    rows: int = 20_000_000
    """Images of a data set in arrays or tables."""
    classes: int = 100_000
    name_characters: int = 200
    """Of the name of one class."""
    names_characters: int = 1_000_000
    """Of the names of all classes."""


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
    """One file or folder in an archive. `read`, `head` and `place` work until the next entry is taken; of a tar, only
    one of `read` and `head` does."""

    path: PurePosixPath
    is_folder: bool
    read: Callable[[], bytes]
    stored: str
    """The name before its Unicode form and blanks were made one."""
    size: int
    """Bytes, as the archive says."""
    place: Callable[[], Place | None]
    """Returns None if the bytes can be reached only by unpacking what is before them, or only by a library."""
    head: Callable[[int], bytes] | None = None
    """Returns so many first bytes without the others; None if it cannot be done."""


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
        found = _zip(path, limits, encoding) if start == _ZIP else _tar(path, limits, encoding, packed=start == _GZIP)
        for count, entry in enumerate(found):
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
    budget = Budget(path, limits)
    with path.open("rb") as raw:
        for member in members(raw.fileno()):
            stored = zipped_name(member, encoding)
            name = _safe(stored)
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_a_file(str(name))
            budget.check(str(name), member.file_size)
            budget.spend(member.file_size)
            read = partial(_read_zipped, raw.fileno(), member, name)
            place = partial(place_zipped, raw.fileno(), member)
            yield Entry(name, stored.endswith("/"), read, stored, member.file_size, place, read)


def zipped_name(member: ZipMember, encoding: str | None) -> str:
    """Return a member's name. Names that are not marked as UTF-8 are decoded anew."""
    if member.is_text:
        return member.filename
    return _decoded(member.stored.partition(b"\0")[0], encoding)


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


def _read_zipped(descriptor: int, member: ZipMember, name: PurePosixPath, most: int | None = None) -> bytes:
    try:
        return read_member(descriptor, member, most)
    except _READING_FAILED as error:
        raise DatasetUnreadable(f"{name} cannot be unpacked: {error}.") from error


_MOST_OVERHEAD = 1024
"""Bytes by which a deflated file of a few bytes may be larger than the file."""


class _Zipped(Protocol):
    """What of a zip's entry says where its bytes are: a `ZipMember` or Python's own `ZipInfo`."""

    @property
    def compress_type(self) -> int: ...
    @property
    def compress_size(self) -> int: ...
    @property
    def file_size(self) -> int: ...
    @property
    def header_offset(self) -> int: ...


def place_zipped(descriptor: int, member: _Zipped) -> Place | None:
    """Return where a zip's member is."""
    deflated = member.compress_type == zipfile.ZIP_DEFLATED
    # The packed size is read in one piece, and it is only what the archive says.
    most = member.file_size + (member.file_size >> 8) + _MOST_OVERHEAD if deflated else member.file_size
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.compress_size > most:
        return None
    start = start_of(descriptor, member.header_offset)
    return None if start is None else Place(start, member.compress_size, member.file_size, deflated)


def _tar(path: Path, limits: Limits, encoding: str | None, packed: bool) -> Iterator[Entry]:
    budget = Budget(path, limits)
    with (
        path.open("rb") as raw,
        gzip.open(raw) if packed else raw as unpacked,
        # A stream: each member is read once, in order, so that a packed archive is never unpacked twice.
        tarfile.open(fileobj=_Metered(unpacked, budget), mode="r|", encoding="utf-8", tarinfo=_TarMember) as archive,
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


class Budget:
    """Counts unpacked bytes and the pixels of pictures, and compares them with the limits."""

    def __init__(self, path: Path, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._packed = path.stat().st_size
        self._unpacked = 0
        self._pixels = 0

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

    def spend_pixels(self, pixels: int) -> None:
        """Count a picture before its pixels are decoded. Raises DatasetUnreadable."""
        self._pixels += pixels
        if self._pixels > max(self._limits.pixels_from, self._limits.pixels_a_byte * self._packed):
            raise DatasetUnreadable(
                f"The pictures have {self._pixels:,} pixels or more in {self._packed:,} bytes: it looks like a bomb.",
                "Send pictures of the size that they need: what is trained on is dataset.image_size pixels wide.",
            )


class _TarMember(tarfile.TarInfo):
    """A tar's member. Records that only say more of the next member (long names, pax headers) are read whole: large
    ones are refused."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _TAR_NOTES and self.size > _MOST_NOTES:
            raise DatasetUnreadable(
                f"The tar has a header of {self.size:,} bytes; the most is {_MOST_NOTES:,}.", "Pack it again."
            )
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


_TAR_NOTES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_MOST_NOTES = 1 << 20


class _Metered(io.RawIOBase):
    """A stream whose bytes are counted: a tar file does not give its size beforehand."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, budget: Budget) -> None:
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
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise DatasetUnreadable(f"The archive has a name that is no text: {name!r}.", "Pack it with names in UTF-8.")
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
