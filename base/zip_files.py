"""Reader of zip files from outside: its directory is read entry by entry, a member in bounded pieces.

Python's `zipfile` makes an object for each entry before the first one is used: half a gigabyte for a million of empty
files in 100 MB. Here an entry is in memory only as long as it is used. Refused, with `BadZipFile`: entries whose packed
bytes are more than the file has, so that several of them must share the same bytes.

    members     the entries in the directory's order
    read_member the bytes of one, or its first ones; never more than the directory says
    count_bytes the size of the directory
"""

import bz2
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_COMMENT = (1 << 16) - 1
_CHUNK_BYTES = 1 << 20
_PIECE_BYTES = 4096
"""Of packed bytes, for LZMA: a piece of them unpacks to 30 MB at most."""
_ZIP64, _UNICODE_PATH = 0x0001, 0x7075
_IN_ZIP64 = 0xFFFFFFFF
ENCRYPTED, UTF8 = 0x1, 0x800
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


class MembersOverlap(zipfile.BadZipFile):
    """The entries have more packed bytes than the file: some share theirs."""


class ZipMember(NamedTuple):
    """An entry of a zip's directory. Its fields have the names that they have in `zipfile.ZipInfo`."""

    filename: str
    """Decoded as UTF-8 if `is_text`, else as cp437, from which the bytes can be had again."""
    is_text: bool
    """True if the zip says that the name is UTF-8."""
    stored: bytes
    flag_bits: int
    compress_type: int
    CRC: int
    compress_size: int
    file_size: int
    external_attr: int
    header_offset: int


class _Directory(NamedTuple):
    start: int
    size: int
    before: int
    """Bytes in front of the archive, as of a program that unpacks itself."""


def count_bytes(descriptor: int) -> int:
    """Return the size of a zip's directory. Raises BadZipFile for any other file."""
    return _find(descriptor).size


def members(descriptor: int) -> Iterator[ZipMember]:
    """Yield the entries of a zip's directory. Raises BadZipFile."""
    start, size, before = _find(descriptor)
    left = os.fstat(descriptor).st_size
    buffer, at, stop = b"", 0, start + size

    def filled(wanted: int) -> bool:
        nonlocal buffer, at, start
        if len(buffer) - at < wanted:
            more = os.pread(descriptor, min(max(_CHUNK_BYTES, wanted), stop - start), start)
            buffer, at, start = buffer[at:] + more, 0, start + len(more)
        return len(buffer) - at >= wanted

    while filled(_ENTRY.size):
        fields = _ENTRY.unpack_from(buffer, at)
        if fields[0] != b"PK\x01\x02":
            raise zipfile.BadZipFile("Bad magic number for central directory")
        lengths = fields[10:13]
        if not filled(_ENTRY.size + sum(lengths)):
            raise zipfile.BadZipFile("Truncated central directory")
        first = at + _ENTRY.size
        second = first + lengths[0]
        one = _member(fields, buffer[first:second], buffer[second : second + lengths[1]], before)
        at += _ENTRY.size + sum(lengths)
        left -= one.compress_size
        if left < 0:
            raise MembersOverlap("its members overlap: together they have more bytes than the file")
        yield one
    if len(buffer) > at or start < stop:
        raise zipfile.BadZipFile("Truncated central directory")


def read_member(descriptor: int, member: ZipMember, most: int | None = None) -> bytes:
    """Return a member's bytes, or the first `most`. Raises BadZipFile, zlib.error, RuntimeError for an encrypted one,
    NotImplementedError for an unknown compression."""
    if member.flag_bits & ENCRYPTED:
        raise RuntimeError(f"{member.filename!r} is encrypted, password required")
    if member.compress_type not in _METHODS:
        raise NotImplementedError(f"the compression method {member.compress_type} is not supported")
    wanted = member.file_size if most is None else min(most, member.file_size)
    pieces, found = [], 0
    for piece in _unpacked(descriptor, member, wanted):
        pieces.append(piece)
        found += len(piece)
    blob = b"".join(pieces)[:wanted]
    if len(blob) < wanted:
        raise zipfile.BadZipFile(f"{member.filename!r} is cut short: it has {len(blob):,} of {wanted:,} bytes")
    if wanted == member.file_size and zlib.crc32(blob) != member.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {member.filename!r}")
    return blob


def start_of(descriptor: int, header_offset: int) -> int | None:
    """Return the place of a member's packed bytes: behind its local header, which ends with a name and an extra
    field. None if there is no header."""
    header = os.pread(descriptor, _LOCAL.size, header_offset)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
        return None
    name, extra = _LOCAL.unpack(header)[-2:]
    return header_offset + _LOCAL.size + int(name) + int(extra)


def _find(descriptor: int) -> _Directory:
    """Return where the directory is, as the record at the file's end says."""
    total = os.fstat(descriptor).st_size
    first = max(0, total - _END.size - _MOST_COMMENT)
    tail = os.pread(descriptor, total - first, first)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise zipfile.BadZipFile("File is not a zip file")
    _, disk, *_, size, offset, _ = _END.unpack_from(tail, at)
    end = first + at
    located = end - _END64_LOCATOR.size
    locator = os.pread(descriptor, _END64_LOCATOR.size, located) if located >= 0 else b""
    if locator.startswith(b"PK\x06\x07") and (end := located - _END64.size) >= 0:
        record = os.pread(descriptor, _END64.size, end)
        if not record.startswith(b"PK\x06\x06"):
            raise zipfile.BadZipFile("Corrupt zip64 end of central directory record")
        *_, size, offset = _END64.unpack(record)
    before = end - size - offset
    if before < 0 or disk not in (0, 0xFFFF):
        raise zipfile.BadZipFile("Bad offset for central directory")
    return _Directory(offset + before, size, before)


def _member(fields: tuple[Any, ...], stored: bytes, extra: bytes, before: int) -> ZipMember:
    _, _, _, flags, method, _, _, crc, packed, size, *_, external, offset = fields
    is_text = bool(flags & UTF8)
    sizes = [size, packed, offset]
    name = stored
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        data, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == _ZIP64:
            sizes = _wide(sizes, data)
        elif kind == _UNICODE_PATH and data[:1] == b"\1" and data[1:5] == struct.pack("<L", zlib.crc32(stored)):
            name, is_text = data[5:], True
    filename = name.decode("utf-8", "strict") if is_text else name.decode("cp437")
    size, packed, offset = sizes
    return ZipMember(
        filename.partition("\0")[0], is_text, stored, flags, method, crc, packed, size, external, offset + before
    )


def _wide(sizes: list[int], data: bytes) -> list[int]:
    """Return the sizes in which those that do not fit into 32 bits are taken from a field of 64 bits, in order."""
    wide = []
    for value in sizes:
        if value != _IN_ZIP64:
            wide.append(value)
        elif len(data) < 8:
            raise zipfile.BadZipFile("Corrupt zip64 extra field")
        else:
            wide.append(int.from_bytes(data[:8], "little"))
            data = data[8:]
    return wide


def _unpacked(descriptor: int, member: ZipMember, wanted: int) -> Iterator[bytes]:
    """Yield a member's bytes in pieces, until there are as many as wanted."""
    start = start_of(descriptor, member.header_offset)
    if start is None:
        raise zipfile.BadZipFile(f"Bad magic number for file header of {member.filename!r}")
    is_lzma = member.compress_type == zipfile.ZIP_LZMA
    decompressor: Any = None
    if member.compress_type == zipfile.ZIP_DEFLATED:
        decompressor = zlib.decompressobj(-zlib.MAX_WBITS)
    elif member.compress_type == zipfile.ZIP_BZIP2:
        decompressor = bz2.BZ2Decompressor()
    elif is_lzma:
        decompressor = zipfile.LZMADecompressor()  # type: ignore[attr-defined]
    stop = start + member.compress_size
    while wanted > 0 and start < stop:
        packed = os.pread(descriptor, min(_PIECE_BYTES if is_lzma else _CHUNK_BYTES, stop - start), start)
        if not packed:
            return
        start += len(packed)
        if decompressor is None:
            piece = packed
        else:
            piece = decompressor.decompress(packed) if is_lzma else decompressor.decompress(packed, wanted)
        wanted -= len(piece)
        yield piece
        if decompressor is not None and getattr(decompressor, "eof", False):
            return
