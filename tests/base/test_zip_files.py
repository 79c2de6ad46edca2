"""Zip files from outside: Python's own reader and writer say what is right."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from base.zip_files import count_bytes, members, read_member, start_of

CONTENT = {"a/ä.png": bytes(range(256)) * 40, "b": b"", "c/": b"", "d": b"d" * 100_000}
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def packed(path: Path, how: int = zipfile.ZIP_DEFLATED, before: bytes = b"", comment: bytes = b"") -> Path:
    path.write_bytes(before)
    with zipfile.ZipFile(path, "a", how) as archive:
        archive.comment = comment
        for name, content in CONTENT.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("how", METHODS)
def test_members_and_read_member_agree_with_python(tmp_path: Path, how: int) -> None:
    path = packed(tmp_path / "x.zip", how)
    with opened(path) as file, zipfile.ZipFile(path) as archive:
        found = list(members(file))
        assert [one.filename for one in found] == archive.namelist() == list(CONTENT)
        for one, info in zip(found, archive.infolist(), strict=True):
            fields = ("flag_bits", "compress_type", "CRC", "compress_size", "file_size", "header_offset")
            assert [getattr(one, field) for field in fields] == [getattr(info, field) for field in fields]
            assert one.external_attr == info.external_attr
            assert read_member(file, one) == archive.read(info) == CONTENT[one.filename]
            assert read_member(file, one, 5) == CONTENT[one.filename][:5]


@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n"], ids=["", "behind a program"])
def test_members_behind_other_bytes_and_before_a_comment(tmp_path: Path, before: bytes) -> None:
    with opened(packed(tmp_path / "x.zip", before=before, comment=b"PK\5 no" * 100)) as file:
        assert {one.filename: read_member(file, one) for one in members(file)} == CONTENT


def test_members_with_sizes_of_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT"):
        monkeypatch.setattr(zipfile, limit, 1)
    path = packed(tmp_path / "x.zip", zipfile.ZIP_STORED)
    assert b"PK\6\6" in path.read_bytes()
    with opened(path) as file:
        assert {one.filename: read_member(file, one) for one in members(file)} == CONTENT


def test_members_with_a_name_in_a_field_for_unicode(tmp_path: Path) -> None:
    class Foreign(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:
            return b"\x84.png", 0

    member = Foreign("a.png")
    field = b"\1" + struct.pack("<L", zlib.crc32(b"\x84.png")) + "ä.png".encode()
    member.extra = struct.pack("<HH", 0x7075, len(field)) + field
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"content")
    with opened(path) as file:
        (one,) = members(file)
        assert (one.filename, one.is_text, one.stored) == ("ä.png", True, b"\x84.png")
        assert read_member(file, one) == b"content"


def test_members_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """A directory of many entries for one member: each would be unpacked by itself."""
    path = packed(tmp_path / "x.zip", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += archive.filelist[3:] * 2
        archive._didModify = True
    with opened(path) as file, pytest.raises(zipfile.BadZipFile, match="overlap"):
        list(members(file))


def test_members_of_a_million_are_not_in_memory_at_once(tmp_path: Path) -> None:
    """The first is yielded before the others are read: here they do not even exist."""
    path = packed(tmp_path / "x.zip")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2")] = 0
    path.write_bytes(content)
    with opened(path) as file:
        found = members(file)
        assert next(found).filename == "a/ä.png"
        with pytest.raises(zipfile.BadZipFile, match="Bad magic number"):
            list(found)


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 100, b"PK\5\6" + b"\xff" * 18], ids=len)
def test_members_of_what_is_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with opened(tmp_path / "x") as file:
        for read in (lambda: list(members(file)), lambda: count_bytes(file)):
            with pytest.raises(zipfile.BadZipFile):
                read()


def test_members_of_a_cut_directory(tmp_path: Path) -> None:
    content = packed(tmp_path / "x.zip").read_bytes()
    end = content.rindex(b"PK\5\6")
    for missing in (1, 20, 60):
        (tmp_path / "y").write_bytes(content[: end - missing] + content[end:])
        with opened(tmp_path / "y") as file, pytest.raises(zipfile.BadZipFile):
            list(members(file))


def test_read_member_that_unpacks_to_more_or_less_than_it_says(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip")
    with opened(path) as file:
        *_, large = members(file)
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            read_member(file, large._replace(file_size=10))
        with pytest.raises(zipfile.BadZipFile, match="cut short"):
            read_member(file, large._replace(file_size=200_000))
        with pytest.raises(zipfile.BadZipFile, match="magic number"):
            read_member(file, large._replace(header_offset=1))
        with pytest.raises(RuntimeError, match="encrypted"):
            read_member(file, large._replace(flag_bits=1))
        with pytest.raises(NotImplementedError):
            read_member(file, large._replace(compress_type=99))
        assert start_of(file, 10**9) is None


def test_count_bytes(tmp_path: Path) -> None:
    path = packed(tmp_path / "x.zip")
    with opened(path) as file:
        content = path.read_bytes()
        assert count_bytes(file) == content.rindex(b"PK\5\6") - content.index(b"PK\1\2")
