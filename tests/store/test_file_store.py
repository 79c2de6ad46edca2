import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from base.errors import StorageFull
from base.files import make_folder
from store.errors import BlobMismatch
from store.file_store import Blob, FileStore, Usage, measured

CONTENT = b"weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "student.safetensors"
    path.write_bytes(CONTENT)
    return path


def all_files(files: FileStore) -> list[Path]:
    return [path for path in files.folder.rglob("*") if path.is_file()]


def test_put_file_and_put_stream_store_by_sha256(files: FileStore, source: Path):
    assert not files.exists(DIGEST)
    assert files.put_file(source) == files.put_stream([CONTENT[:9], CONTENT[9:]]) == Blob(DIGEST, 7000)
    assert files.exists(DIGEST)
    assert files.path(DIGEST).read_bytes() == CONTENT
    assert all_files(files) == [files.path(DIGEST)]


def test_put_stream_of_no_bytes(files: FileStore):
    blob = files.put_stream([])
    assert (blob.bytes, files.path(blob.sha256).read_bytes()) == (0, b"")


def test_put_stream_again_replaces_a_damaged_blob(files: FileStore):
    files.put_stream([CONTENT])
    files.path(DIGEST).write_bytes(b"damaged")
    files.put_stream([CONTENT])
    assert files.path(DIGEST).read_bytes() == CONTENT


def test_put_stream_that_breaks_leaves_nothing(files: FileStore):
    def broken_stream() -> Iterator[bytes]:
        yield CONTENT
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        files.put_stream(broken_stream())
    assert all_files(files) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_put_stream_on_a_full_disk_raises_storage_full_and_leaves_nothing(
    files: FileStore, monkeypatch: Any, code: int
):
    files.put_stream([CONTENT])

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match=os.strerror(code)) as refused:
        files.put_stream([b"more"])
    assert (refused.value.code, refused.value.retryable) == ("storage_full", True)
    assert all_files(files) == [files.path(DIGEST)]
    assert files.path(DIGEST).read_bytes() == CONTENT


def test_put_stream_on_a_disk_that_fills_up_leaves_nothing(files: FileStore, monkeypatch: Any):
    """The first chunk fits, the second does not."""

    class NearlyFull:
        def __init__(self, *_: Any) -> None:
            self.free_bytes = 10

        def __enter__(self) -> "NearlyFull":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def write(self, chunk: bytes) -> int:
            self.free_bytes -= len(chunk)
            if self.free_bytes < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(chunk)

    monkeypatch.setattr(Path, "open", NearlyFull)
    with pytest.raises(StorageFull, match="No space left"):
        files.put_stream([b"12345678", b"12345678"])
    assert all_files(files) == []


def test_put_stream_does_not_translate_other_errors(files: FileStore, monkeypatch: Any):
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        files.put_stream([CONTENT])


def test_put_stream_syncs_the_file_then_renames_then_syncs_the_folder(files: FileStore, monkeypatch: Any):
    """The order that survives a power cut."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        steps.append("fsync " + Path(f"/proc/self/fd/{descriptor}").resolve().name[:2])

    def recorded_replace(path: Path, target: Path) -> Path:
        assert not files.exists(DIGEST)
        steps.append("rename")
        return replace(path, target)

    files.put_stream([b"makes the folders"])
    make_folder(files.path(DIGEST).parent)
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    files.put_stream([CONTENT])
    assert [step.split()[0] for step in steps] == ["fsync", "rename", "fsync"]
    assert (steps[0][:7], steps[2]) == ("fsync .", f"fsync {DIGEST[:2]}")


def test_put_checkpoint_stores_by_attempt(files: FileStore, source: Path):
    assert files.put_checkpoint("job_1", 2, 120, source, DIGEST) == Blob(DIGEST, 7000)
    path = files.checkpoint_path("job_1", 2, 120)
    assert path.read_bytes() == CONTENT
    assert files.relative(path) == "checkpoints/job_1/2/000000120.pt"


def test_put_checkpoint_with_another_digest_writes_nothing(files: FileStore, source: Path):
    with pytest.raises(BlobMismatch, match="expected 00"):
        files.put_checkpoint("job_1", 2, 120, source, "00" * 32)
    assert all_files(files) == []


def put_and_trashed(files: FileStore) -> Path:
    """Put a blob and move it to the trash. Returns its former path."""
    path = files.path(files.put_stream([CONTENT]).sha256)
    assert files.move_to_trash(DIGEST, unused_since=files.now())
    assert not path.exists()
    return path


@pytest.mark.parametrize("use", [FileStore.path, FileStore.exists])
def test_path_and_exists_restore_a_blob_from_the_trash(files: FileStore, use: Any):
    path = put_and_trashed(files)
    os.utime(files.trash_path(DIGEST), (0, 0))
    used_at = files.now()
    assert use(files, DIGEST)
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mtime >= used_at
    assert all_files(files) == [path]


def test_move_to_trash_spares_a_blob_that_was_used_lately(files: FileStore):
    path = files.path(files.put_stream([CONTENT]).sha256)
    os.utime(path, (0, 0))
    long_ago = files.now() - 60
    assert files.exists(DIGEST)
    assert not files.move_to_trash(DIGEST, unused_since=long_ago)
    assert path.exists()


def test_move_to_trash_restores_a_blob_that_was_used_meanwhile(files: FileStore, monkeypatch: Any):
    path = files.path(files.put_stream([CONTENT]).sha256)
    os.utime(path, (0, 0))
    long_ago, replace = files.now() - 60, Path.replace

    def used_before_replace(source: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        assert files.exists(DIGEST)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", used_before_replace)
    assert not files.move_to_trash(DIGEST, unused_since=long_ago)
    assert path.read_bytes() == CONTENT


def test_restore_does_not_replace_a_blob_that_was_put_again(files: FileStore):
    path = put_and_trashed(files)
    files.trash_path(DIGEST).write_bytes(b"damaged")
    files.put_stream([CONTENT])
    assert not files.restore(DIGEST)
    assert path.read_bytes() == CONTENT


def test_move_to_trash_and_restore_return_false_the_second_time(files: FileStore):
    put_and_trashed(files)
    assert not files.move_to_trash(DIGEST, unused_since=files.now())
    assert files.restore(DIGEST)
    assert not files.restore(DIGEST)


def test_adopt_is_a_use(files: FileStore, source: Path):
    os.utime(source, (0, 0))
    before = files.now()
    files.adopt(source)
    assert files.last_used_at(DIGEST) >= before
    assert files.last_used_at("0" * 64) == float("-inf")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EPERM, errno.EACCES])
def test_exists_where_the_mtime_may_not_be_set(files: FileStore, monkeypatch: Any, code: int):
    files.put_stream([CONTENT])

    def refused(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "utime", refused)
    assert files.exists(DIGEST)


def test_put_stream_removes_a_folder_that_could_not_be_synced(files: FileStore, tmp_path: Path, monkeypatch: Any):
    """Otherwise the next writer would take it for durable, and its files would be lost in a power cut."""
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


def test_delete_job_files_leaves_blobs_and_other_jobs(files: FileStore, source: Path):
    files.put_file(source)
    for job_id in ("job_1", "job_2"):
        files.put_checkpoint(job_id, 1, 1, source)
    files.delete_job_files("job_1")
    files.delete_job_files("job_none")
    assert set(all_files(files)) == {files.path(DIGEST), files.checkpoint_path("job_2", 1, 1)}


def test_temporaries_are_old_unfinished_files(files: FileStore):
    files.put_stream([CONTENT])
    old, young = files.path(DIGEST).with_name(".a.tmp"), files.path(DIGEST).with_name(".b.tmp")
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    assert files.temporaries() == [old]


def test_free_bytes_before_anything_is_written(files: FileStore):
    assert files.free_bytes() > 0


def test_measured_of_a_file_and_of_a_folder(tmp_path: Path):
    (tmp_path / "one").write_bytes(b"12")
    assert measured(tmp_path / "one") == measured(tmp_path) == Usage(1, 2)


def test_share_gives_a_checkpoint_a_second_name_that_outlives_its_first(files: FileStore, tmp_path: Path):
    source = tmp_path / "made.pt"
    source.write_bytes(b"state")
    blob = files.put_checkpoint("job_1", 1, 7, source)
    path = files.checkpoint_path("job_1", 1, 7)
    with pytest.raises(BlobMismatch, match=r"000000007\.pt"):
        files.share(path, "0" * 64)
    for _ in range(2):
        files.share(path, blob.sha256)
    assert path.samefile(files.path(blob.sha256))
    path.unlink()
    assert files.path(blob.sha256).read_bytes() == b"state"
    files.share(path, blob.sha256)  # It is there already.
    with pytest.raises(FileNotFoundError):
        files.share(path, "0" * 64)


def test_share_copies_where_there_are_no_hard_links(files: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    source = tmp_path / "made.pt"
    source.write_bytes(b"state")
    blob = files.put_checkpoint("job_1", 1, 7, source)
    files.share(files.checkpoint_path("job_1", 1, 7), blob.sha256)
    assert files.path(blob.sha256).read_bytes() == b"state"
    assert not files.path(blob.sha256).samefile(files.checkpoint_path("job_1", 1, 7))
