import hashlib
import os
from pathlib import Path

import pytest

from base.errors import StorageFull
from base.files import write_text, write_whole


def test_what_was_written_is_whole_and_known_by_its_digest(tmp_path):
    written = write_text(tmp_path / "deep" / "file.txt", "hello")
    assert written.path.read_text() == "hello"
    assert (written.bytes, written.sha256) == (5, hashlib.sha256(b"hello").hexdigest())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageFull, match="no room to write file: No space left on device"):
        write_whole(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


def test_nothing_has_its_name_before_it_is_durable_and_the_folder_is_synced_after(tmp_path, monkeypatch):
    """The order that survives a power cut: fsync the bytes, rename, fsync the folder."""
    done, fsync, replace = [], os.fsync, Path.replace

    def noted_fsync(descriptor):
        fsync(descriptor)
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)

    def noted_replace(path, target):
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_text(tmp_path / "file", "bytes")
    temporary, *rest = done
    assert temporary.startswith(".file.") and rest == ["rename", tmp_path.name]
