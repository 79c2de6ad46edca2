import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from base.errors import StorageFull
from base.files import make_folder
from store.blobs import Blob, BlobStore
from store.errors import BlobMismatch

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "files")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    path.write_bytes(CONTENT)
    return path


def everything(files: BlobStore) -> list[Path]:
    return [path for path in files.folder.rglob("*") if path.is_file()]


def test_bytes_are_known_by_their_sha256(files: BlobStore, source: Path):
    assert not files.exists(DIGEST)
    assert files.put_file(source) == files.put_stream([CONTENT[:9], CONTENT[9:]]) == Blob(DIGEST, 7000)
    assert files.exists(DIGEST)
    assert files.path(DIGEST).read_bytes() == CONTENT
    assert everything(files) == [files.path(DIGEST)]


def test_the_empty_file_is_a_blob_too(files: BlobStore):
    blob = files.put_stream([])
    assert (blob.bytes, files.path(blob.sha256).read_bytes()) == (0, b"")


def test_putting_it_again_heals_what_has_rotted(files: BlobStore):
    files.put_stream([CONTENT])
    files.path(DIGEST).write_bytes(b"rot")
    files.put_stream([CONTENT])
    assert files.path(DIGEST).read_bytes() == CONTENT


def test_a_stream_that_breaks_leaves_nothing(files: BlobStore):
    def torn() -> Iterator[bytes]:
        yield CONTENT
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        files.put_stream(torn())
    assert everything(files) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_without_room_is_told_as_such_and_leaves_nothing(files: BlobStore, monkeypatch: Any, code: int):
    files.put_stream([CONTENT])

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match=os.strerror(code)) as refused:
        files.put_stream([b"more"])
    assert (refused.value.code, refused.value.retryable) == ("storage_full", True)
    assert everything(files) == [files.path(DIGEST)]
    assert files.path(DIGEST).read_bytes() == CONTENT


def test_a_disk_that_fills_up_mid_way_leaves_nothing(files: BlobStore, monkeypatch: Any):
    """The first chunk fits, the second does not: as a real full disk behaves."""

    class Nearly:
        def __init__(self, *_: Any) -> None:
            self.room = 10

        def __enter__(self) -> "Nearly":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def write(self, chunk: bytes) -> int:
            self.room -= len(chunk)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(chunk)

    monkeypatch.setattr(Path, "open", Nearly)
    with pytest.raises(StorageFull, match="No space left"):
        files.put_stream([b"12345678", b"12345678"])
    assert everything(files) == []


def test_other_faults_of_a_disk_stay_what_they_are(files: BlobStore, monkeypatch: Any):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        files.put_stream([CONTENT])


def test_nothing_has_its_name_before_it_is_durable_and_the_folder_is_synced_after(files: BlobStore, monkeypatch: Any):
    """The order that survives a power cut: fsync the bytes, rename, fsync the folder."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append("fsync " + Path(f"/proc/self/fd/{descriptor}").resolve().name[:2])

    def noted_replace(path: Path, target: Path) -> Path:
        assert not files.exists(DIGEST)
        done.append("rename")
        return replace(path, target)

    files.put_stream([b"makes the folders"])
    make_folder(files.path(DIGEST).parent)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    files.put_stream([CONTENT])
    assert [step.split()[0] for step in done] == ["fsync", "rename", "fsync"]
    assert (done[0][:7], done[2]) == ("fsync .", f"fsync {DIGEST[:2]}")


def test_a_checkpoint_lies_under_its_attempt(files: BlobStore, source: Path):
    assert files.put_checkpoint("job_1", 2, 120, source, DIGEST) == Blob(DIGEST, 7000)
    path = files.checkpoint_path("job_1", 2, 120)
    assert path.read_bytes() == CONTENT
    assert files.relative(path) == "checkpoints/job_1/2/000000120.pt"


def test_a_checkpoint_that_is_not_what_was_announced_gets_no_name(files: BlobStore, source: Path):
    with pytest.raises(BlobMismatch, match="announced 00"):
        files.put_checkpoint("job_1", 2, 120, source, "00" * 32)
    assert everything(files) == []


def thrown_away(files: BlobStore) -> Path:
    path = files.path(files.put_stream([CONTENT]).sha256)
    assert files.throw_away(DIGEST, untouched_since=files.now())
    assert not path.exists()
    return path


@pytest.mark.parametrize("ask", [BlobStore.path, BlobStore.exists])
def test_whoever_asks_for_what_is_in_the_trash_gets_it_back(files: BlobStore, ask: Any):
    path = thrown_away(files)
    os.utime(files.trash_path(DIGEST), (0, 0))
    asked_at = files.now()
    assert ask(files, DIGEST)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mtime >= asked_at
    assert everything(files) == [path]


def test_whoever_asks_keeps_it_out_of_the_trash(files: BlobStore):
    path = files.path(files.put_stream([CONTENT]).sha256)
    os.utime(path, (0, 0))
    long_ago = files.now() - 60
    assert files.exists(DIGEST)
    assert not files.throw_away(DIGEST, untouched_since=long_ago)
    assert path.exists()


def test_who_asks_in_the_middle_of_the_move_gets_it_back(files: BlobStore, monkeypatch: Any):
    path = files.path(files.put_stream([CONTENT]).sha256)
    os.utime(path, (0, 0))
    long_ago, replace = files.now() - 60, Path.replace

    def asked_first(source: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        assert files.exists(DIGEST)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", asked_first)
    assert not files.throw_away(DIGEST, untouched_since=long_ago)
    assert path.read_bytes() == CONTENT


def test_what_was_put_again_is_not_replaced_by_the_copy_in_the_trash(files: BlobStore):
    path = thrown_away(files)
    files.trash_path(DIGEST).write_bytes(b"rot")
    files.put_stream([CONTENT])
    assert not files.bring_back(DIGEST)
    assert path.read_bytes() == CONTENT


def test_nothing_is_thrown_away_or_brought_back_twice(files: BlobStore):
    thrown_away(files)
    assert not files.throw_away(DIGEST, untouched_since=files.now())
    assert files.bring_back(DIGEST)
    assert not files.bring_back(DIGEST)


def test_an_adopted_file_is_as_young_as_one_that_was_put(files: BlobStore, source: Path):
    os.utime(source, (0, 0))
    before = files.now()
    files.adopt(source)
    assert files.touched_at(DIGEST) >= before
    assert files.touched_at("0" * 64) == float("-inf")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EPERM, errno.EACCES])
def test_what_may_not_be_touched_can_be_read_all_the_same(files: BlobStore, monkeypatch: Any, code: int):
    files.put_stream([CONTENT])

    def refused(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "utime", refused)
    assert files.exists(DIGEST)


def test_a_folder_that_could_not_be_made_durable_is_not_there(files: BlobStore, tmp_path: Path, monkeypatch: Any):
    """Else who comes next would take it for durable, and lose what is put into it in a power cut."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="No space left"):
        files.put_stream([CONTENT])
    assert not files.folder.exists()
    monkeypatch.setattr(os, "fsync", fsync)
    files.put_stream([CONTENT])
    assert files.exists(DIGEST)


def test_a_deleted_job_takes_its_files_along_and_leaves_blobs(files: BlobStore, source: Path):
    files.put_file(source)
    for job_id in ("job_1", "job_2"):
        files.put_checkpoint(job_id, 1, 1, source)
    files.forget_job("job_1")
    files.forget_job("job_none")
    assert set(everything(files)) == {files.path(DIGEST), files.checkpoint_path("job_2", 1, 1)}


def test_only_old_temporaries_were_left_behind(files: BlobStore):
    files.put_stream([CONTENT])
    old, young = files.path(DIGEST).with_name(".a.tmp"), files.path(DIGEST).with_name(".b.tmp")
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    assert files.temporaries() == [old]


def test_room_is_known_before_anything_is_written(files: BlobStore):
    assert files.free_bytes() > 0
