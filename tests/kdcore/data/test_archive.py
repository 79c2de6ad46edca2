import io
import os
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from base.errors import DatasetUnreadable
from kdcore.data.archive import LIMITS, Budget, Limits, Place, entries, read_at


def contents(path: Path, limits: Limits = LIMITS) -> dict[str, bytes | None]:
    return {str(entry.path): None if entry.is_folder else entry.read() for entry in entries(path, limits)}


def tar_with(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def test_entries_members_in_order(pack):
    members = {"b/2": b"two", "a/1": b"one", "./c": b""}
    assert contents(pack(members)) == {"b/2": b"two", "a/1": b"one", "c": b""}


def test_entries_what_operating_systems_leave_behind_is_passed_over(pack):
    clutter = (".DS_Store", "a/.hidden/x", "__MACOSX/a/._1", "a/Thumbs.db", "a/desktop.ini")
    assert list(contents(pack({"a/1": b"one", **dict.fromkeys(clutter, b"?")}))) == ["a/1"]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\..\\evil"])
def test_entries_names_that_climb_out_are_refused(pack, name):
    with pytest.raises(DatasetUnreadable, match="a path outside itself"):
        contents(pack({"a/1": b"one", name: b"evil"}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_entries_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    link = tarfile.TarInfo("a/link")
    link.type, link.linkname = kind, "/etc/passwd"
    with pytest.raises(DatasetUnreadable, match="a/link is a link or a device"):
        contents(tar_with(tmp_path / "t", link))


def test_entries_a_link_in_a_zip_is_refused(tmp_path):
    path = tmp_path / "z"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("a/link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DatasetUnreadable, match="a/link is a link"):
        contents(path)


def test_entries_folders_are_seen(tmp_path):
    folder = tarfile.TarInfo("empty")
    folder.type = tarfile.DIRTYPE
    assert contents(tar_with(tmp_path / "t", folder)) == {"empty": None}
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.mkdir("empty")
    assert contents(tmp_path / "z") == {"empty": None}


def test_entries_too_many_members(pack):
    with pytest.raises(DatasetUnreadable, match="more than 2 members"):
        contents(pack({str(n): b"" for n in range(3)}), Limits(members=2))


def test_entries_too_many_folders_inside_of_each_other(pack):
    assert len(contents(pack({"a/" * 63 + "x": b""}))) == 1
    with pytest.raises(DatasetUnreadable, match="more than 64 folders inside of each other"):
        contents(pack({"a/" * 64 + "x": b""}))


def test_entries_a_member_too_large(pack):
    with pytest.raises(DatasetUnreadable, match="b unpacks to 11 bytes; the most is 10"):
        contents(pack({"a": b"0123456789", "b": b"01234567890"}), Limits(member_bytes=10))


def test_entries_too_much_in_all(pack):
    with pytest.raises(DatasetUnreadable, match="more than 25,000 bytes"):
        contents(pack({str(n): b"x" * 10_000 for n in range(4)}), Limits(total_bytes=25_000))


def test_entries_a_bomb(pack_zip, tmp_path):
    zeros = bytes(1 << 20)
    bomb = pack_zip({"zeros": zeros})
    with pytest.raises(DatasetUnreadable, match="looks like a bomb"):
        contents(bomb, Limits(ratio_from_bytes=1000))
    with tarfile.open(tmp_path / "bomb", "w:gz") as archive:
        member = tarfile.TarInfo("zeros")
        member.size = len(zeros)
        archive.addfile(member, io.BytesIO(zeros))
    with pytest.raises(DatasetUnreadable, match="looks like a bomb"):
        contents(tmp_path / "bomb", Limits(ratio_from_bytes=1000))


def test_entries_a_cut_archive_is_an_error(pack):
    path = pack({str(n): bytes([n] * 3000) + str(n * 7919).encode() * 500 for n in range(20)})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DatasetUnreadable, match="cannot be"):
        contents(path)


def test_entries_a_flipped_byte_in_a_zip_names_the_member(pack_zip):
    path = pack_zip({"a/1.png": b"incompressible?" * 3})
    blob = bytearray(path.read_bytes())
    blob[45] ^= 0xFF
    path.write_bytes(blob)
    with pytest.raises(DatasetUnreadable, match=r"a/1\.png cannot be unpacked"):
        contents(path)


@pytest.mark.parametrize("blob", [b"", b"PK", b"\x1f\x8b", b"just text " * 200], ids=["empty", "zip", "gzip", "text"])
def test_entries_what_is_no_archive_is_an_error(tmp_path, blob):
    path = tmp_path / "x"
    path.write_bytes(blob)
    with pytest.raises(DatasetUnreadable, match="cannot be read"):
        contents(path)


def test_entries_a_password_is_an_error(pack_zip):
    path = pack_zip({"a/1.png": b"secret"})
    blob = bytearray(path.read_bytes())
    directory = blob.index(b"PK\x01\x02")
    blob[6] |= 1
    blob[directory + 8] |= 1
    path.write_bytes(blob)
    with pytest.raises(DatasetUnreadable, match="encrypted"):
        contents(path)


def zip_of(path: Path, *names: bytes) -> Path:
    """Names as bytes, without the flag for UTF-8, as common archivers write them."""

    class Plain(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:
            return raw[self.filename], self.flag_bits & ~0x800

    raw = {f"{number:03}": name for number, name in enumerate(names)}
    with zipfile.ZipFile(path, "w") as archive:
        for key in raw:
            archive.writestr(Plain(key), key)
    return path


def tar_of(path: Path, *names: bytes) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = 3
            archive.addfile(info, io.BytesIO(f"{number:03}".encode()))
    return path


BOTH = pytest.mark.parametrize("make", [zip_of, tar_of])


@BOTH
def test_entries_names_are_utf8_without_a_flag(make, tmp_path):
    names = ("锚/é.png", "ключ/1.png", "plain/ü.png")
    assert list(contents(make(tmp_path / "x", *(name.encode() for name in names)))) == list(names)


@BOTH
@pytest.mark.parametrize(
    ("encoding", "name"), [("gbk", "锚/钟.png"), ("cp866", "ключ/1.png"), ("cp437", "Größe/1.png")]
)
def test_entries_names_in_another_encoding_are_refused_or_decoded(make, encoding, name, tmp_path):
    path = make(tmp_path / "x", b"plain/1.png", name.encode(encoding))
    with pytest.raises(DatasetUnreadable, match="The names in this archive are in an unknown encoding") as caught:
        contents(path)
    assert "encoding" in (caught.value.hint or "")
    assert [str(entry.path) for entry in entries(path, LIMITS, encoding)] == ["plain/1.png", name]


@BOTH
def test_entries_an_encoding_that_does_not_fit_or_exist_is_refused(make, tmp_path):
    path = make(tmp_path / "x", b"\xff\xff/1.png")
    with pytest.raises(DatasetUnreadable, match=r"not in the encoding 'gbk': .xff.xff/1\.png"):
        list(entries(path, LIMITS, "gbk"))
    for unknown in ("klingon", "hex", "zlib"):
        with pytest.raises(DatasetUnreadable, match=f"no text encoding '{unknown}'"):
            list(entries(path, LIMITS, unknown))


def test_entries_flagged_names_do_not_depend_on_the_encoding(pack_zip):
    path = pack_zip({"锚/1.png": b"?"})
    assert [str(entry.path) for entry in entries(path, LIMITS, "cp866")] == ["锚/1.png"]


def test_entries_pax_names_do_not_depend_on_the_encoding(tmp_path):
    path = tmp_path / "x"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("锚/1.png"))
    assert [str(entry.path) for entry in entries(path, LIMITS, "cp866")] == ["锚/1.png"]


def test_entries_unicode_forms_and_trailing_blanks_are_made_one(pack):
    composed, split_up = "caf\u00e9/a.png", "cafe\u0301 /b.png"
    found = [(str(entry.path), entry.stored) for entry in entries(pack({composed: b"1", split_up: b"2"}), LIMITS)]
    assert found == [(composed, composed), ("caf\u00e9/b.png", split_up)]


@BOTH
def test_entries_blanks_hide_no_path_outside(make, tmp_path):
    with pytest.raises(DatasetUnreadable, match="a path outside itself"):
        contents(make(tmp_path / "x", b"a/.. /.. /evil"))


def read_again(path: Path) -> dict[str, bytes | None]:
    with path.open("rb") as file:
        places = {str(entry.path): entry.place() for entry in entries(path, LIMITS) if not entry.is_folder}
        return {name: place and read_at(file.fileno(), place) for name, place in places.items()}


def test_place_is_where_the_bytes_are_in_a_zip_or_a_plain_tar(pack, tmp_path):
    members = {"a/" + "long" * 40: b"one" * 50, "b": b"", "c": os.urandom(700)}
    path = pack(members)
    packed = path.read_bytes().startswith(b"\x1f\x8b")
    assert read_again(path) == (dict.fromkeys(members) if packed else members)
    # A zip with something before it: all its offsets are moved.
    if path.suffix == ".zip":
        path.write_bytes(b"PK, and something else" + path.read_bytes())
        assert read_again(path) == members


def test_place_of_what_only_a_library_unpacks_is_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"one" * 50)
    assert read_again(tmp_path / "x") == {"a": None}


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_entries_a_packed_size_that_cannot_be_true_is_refused(tmp_path, how):
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("a", b"one" * 50)
        archive.infolist()[0].compress_size += 1 << 31
    with pytest.raises(DatasetUnreadable, match="more bytes than the file"):
        read_again(path)


def test_read_at_unpacks_no_more_than_the_size_that_was_noted(tmp_path):
    bomb = zlib.compress(bytes(10_000_000), wbits=-15)
    (tmp_path / "x").write_bytes(b"__" + bomb)
    with (tmp_path / "x").open("rb") as file:
        assert read_at(file.fileno(), Place(2, len(bomb), 100, True)) == bytes(100)
        assert read_at(file.fileno(), Place(3, len(bomb), 100, True)) == b""
        assert read_at(file.fileno(), Place(10**9, 5, 5)) == b""


def test_entries_give_the_first_bytes_of_a_zips_member(pack_zip):
    (entry,) = entries(pack_zip({"a": b"0123456789" * 1000}), LIMITS)
    assert entry.head is not None and entry.size == 10_000


def test_entries_of_a_zip_are_read_before_its_directory_ends(tmp_path):
    """Of a million entries, only those that are used are ever in memory."""
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(20):
            archive.writestr(f"a/{number}", b"x")
    blob = bytearray(path.read_bytes())
    blob[blob.rindex(b"PK\x01\x02")] = 0
    path.write_bytes(blob)
    found = entries(path, LIMITS)
    assert next(found).read() == b"x"
    with pytest.raises(DatasetUnreadable, match="cannot be read"):
        list(found)


def test_entries_that_share_bytes_are_refused(tmp_path):
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(1 << 20))
        archive.filelist += archive.filelist * 99
    with pytest.raises(DatasetUnreadable, match="its members overlap"):
        contents(path)


def test_entries_of_a_tar_with_a_large_header_are_refused(tmp_path):
    """A pax header is read whole: one of gigabytes may stand before any member."""
    path = tmp_path / "x"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a/1.png")
        member.pax_headers = {"comment": "x" * (2 << 20)}
        archive.addfile(member)
    with pytest.raises(DatasetUnreadable, match=r"a header of 2,09\d,\d+ bytes; the most is 1,048,576"):
        contents(path)


def test_entries_names_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "x"
    member = tarfile.TarInfo("a/1.png")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
        member.name = "a/\udcff.png"
        archive.addfile(member)
    with pytest.raises(DatasetUnreadable, match="no text"):
        contents(path)


def test_budget_of_pixels(tmp_path):
    (tmp_path / "x").write_bytes(b"x" * 100)
    budget = Budget(tmp_path / "x", Limits(pixels_from=1000, pixels_a_byte=20))
    budget.spend_pixels(1999)
    budget.spend_pixels(1)
    with pytest.raises(DatasetUnreadable, match="2,001 pixels or more in 100 bytes"):
        budget.spend_pixels(1)
