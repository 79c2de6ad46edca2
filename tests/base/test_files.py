import errno
import hashlib
import os
from pathlib import Path

import pytest

from base.errors import StorageFull
from base.files import (
    disk_full_as_storage_full,
    keep_private,
    storage_full,
    too_many_files,
    write_text,
    write_whole,
)


def test_write_text_returns_path_bytes_and_digest(tmp_path):
    written = write_text(tmp_path / "deep" / "file.txt", "hello")
    assert written.path.read_text() == "hello"
    assert (written.bytes, written.sha256) == (5, hashlib.sha256(b"hello").hexdigest())


def test_write_whole_that_fails_leaves_the_old_file_only(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageFull, match="no disk space to write file: No space left on device"):
        write_whole(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_write_text_syncs_the_file_then_renames_then_syncs_the_folder(tmp_path, monkeypatch):
    """The order that survives a power cut."""
    steps, fsync, replace = [], os.fsync, Path.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        steps.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)

    def recorded_replace(path, target):
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    write_text(tmp_path / "file", "bytes")
    temporary, *rest = steps
    assert temporary.startswith(".file.") and rest == ["rename", tmp_path.name]


def test_storage_full_calls_a_read_only_disk_what_it_is(tmp_path):
    read_only = storage_full(OSError(errno.EROFS, os.strerror(errno.EROFS)), "in cache")
    assert read_only.message == "cannot write in cache: Read-only file system"
    assert "space" not in f"{read_only.message}{read_only.hint}" and "mount it for writing" in str(read_only.hint)
    with pytest.raises(StorageFull, match="cannot write in cache"), disk_full_as_storage_full(tmp_path / "cache"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    assert "no disk space" in storage_full(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))).message


def modes(folder):
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in [folder, *folder.rglob("*")]}


def test_keep_private_takes_the_rights_of_others_and_no_more(tmp_path):
    store = tmp_path / "store"
    (store / "blobs").mkdir(parents=True)
    for path, mode in ((store, 0o755), (store / "blobs", 0o775)):
        path.chmod(mode)
    for name, mode in (("weights", 0o644), ("library", 0o755), ("mine", 0o400)):
        (store / "blobs" / name).touch()
        (store / "blobs" / name).chmod(mode)
    (tmp_path / "outside").touch(0o644)
    (store / "link").symlink_to(tmp_path / "outside")
    keep_private(store, tmp_path / "missing")
    found = modes(store)
    outside = found.pop("link")
    assert outside == 0o644, "a link leads to a file that is not ours"
    assert found == {".": 0o700, "blobs": 0o700, "blobs/weights": 0o600, "blobs/library": 0o700, "blobs/mine": 0o400}
    store.chmod(0o755)
    (tmp_path / "elsewhere").symlink_to(store)
    keep_private(tmp_path / "elsewhere")
    assert store.stat().st_mode & 0o777 == 0o700
    (store / "blobs" / "weights").chmod(0o644)
    keep_private(store)
    assert (store / "blobs" / "weights").stat().st_mode & 0o777 == 0o644, "a private folder is not walked again"


def test_too_many_files_finds_the_cause_in_what_a_library_makes_of_it():
    for number in (errno.EMFILE, errno.ENFILE):
        try:
            try:
                raise OSError(number, "Too many open files")
            except OSError:
                raise ValueError("this is no image") from None
        except ValueError as error:
            found = too_many_files(error)
        assert found is not None and found.message == "no file can be opened: Too many open files"
    assert too_many_files(OSError(errno.ENOENT, "no such file")) is None
