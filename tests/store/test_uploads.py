import hashlib
import os
from pathlib import Path

import pytest

from base.files import make_folder
from store import uploads
from store.database import Database
from store.errors import BlobMismatch, NotFound, OffsetConflict, UploadBusy
from store.file_store import Blob, FileStore
from store.uploads import Upload

CONTENT = b"0123456789" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def created(database: Database, bytes: int | None = None, sha256: str | None = None) -> Upload:
    with database.begin() as connection:
        return uploads.create(connection, "ours", filename="teacher.pt", bytes=bytes, sha256=sha256)


def appended(database: Database, files: FileStore, upload: Upload, content: bytes) -> Upload:
    with uploads.open_part(files, upload) as file:
        file.write(content)
    with database.begin() as connection:
        return uploads.append(connection, "ours", upload.id, offset=upload.offset, length=len(content))


def completed(database: Database, files: FileStore, upload: Upload) -> Upload:
    blob = uploads.adopt(files, upload)
    with database.begin() as connection:
        return uploads.complete(connection, "ours", upload.id, blob)


def test_append_and_complete_make_a_blob_of_the_parts(database: Database, files: FileStore):
    upload = created(database, len(CONTENT), DIGEST)
    assert (upload.status, upload.offset, upload.filename) == ("open", 0, "teacher.pt")
    for part in (CONTENT[:400], CONTENT[400:]):
        upload = appended(database, files, upload, part)
    done = completed(database, files, upload)
    assert (done.status, done.bytes, done.sha256) == ("complete", len(CONTENT), DIGEST)
    assert files.path(DIGEST).read_bytes() == CONTENT
    assert not files.upload_path(upload.id).exists()


def test_complete_writes_size_and_digest_that_were_not_announced(database: Database, files: FileStore):
    done = completed(database, files, appended(database, files, created(database), CONTENT))
    assert (done.bytes, done.sha256) == (len(CONTENT), DIGEST)


def test_open_part_continues_at_the_offset_after_a_broken_part(database: Database, files: FileStore):
    upload = appended(database, files, created(database, len(CONTENT), DIGEST), CONTENT[:400])
    with pytest.raises(ConnectionResetError), uploads.open_part(files, upload) as file:
        file.write(b"torn" * 500)
        raise ConnectionResetError
    assert completed(database, files, appended(database, files, upload, CONTENT[400:])).sha256 == DIGEST


def test_append_at_another_offset_raises_offset_conflict(database: Database, files: FileStore):
    upload = appended(database, files, created(database), CONTENT[:400])
    with pytest.raises(OffsetConflict, match="continues at byte 400, not at 0"), database.begin() as connection:
        uploads.append(connection, "ours", upload.id, offset=0, length=10)


def test_open_part_while_another_is_open_raises_upload_busy(database: Database, files: FileStore):
    upload = created(database)
    with uploads.open_part(files, upload):
        with pytest.raises(UploadBusy), uploads.open_part(files, upload):
            pass
        with pytest.raises(UploadBusy):
            uploads.adopt(files, upload)


def test_open_part_of_a_stale_request_does_not_truncate(database: Database, files: FileStore):
    stale = created(database, len(CONTENT), DIGEST)
    upload = appended(database, files, stale, CONTENT)
    with uploads.open_part(files, stale) as file:
        file.write(CONTENT[:5])
    assert completed(database, files, upload).sha256 == DIGEST


@pytest.mark.parametrize(
    ("announced", "message"),
    [((len(CONTENT) + 1, None), "expected 1001 bytes, got 1000 bytes"), ((None, "00" * 32), f"got {DIGEST}")],
    ids=["size", "digest"],
)
def test_adopt_raises_blob_mismatch_if_not_as_announced(
    database: Database, files: FileStore, announced: tuple[int | None, str | None], message: str
):
    upload = appended(database, files, created(database, *announced), CONTENT)
    with pytest.raises(BlobMismatch, match=message):
        uploads.adopt(files, upload)
    assert not files.exists(DIGEST)


def test_adopt_and_complete_are_idempotent(database: Database, files: FileStore):
    upload = appended(database, files, created(database, len(CONTENT), DIGEST), CONTENT)
    first = completed(database, files, upload)
    assert completed(database, files, first) == completed(database, files, upload) == first


def test_adopt_without_the_file_raises_not_found(database: Database, files: FileStore):
    upload = appended(database, files, created(database), CONTENT)
    uploads.delete_file(files, upload.id)
    with pytest.raises(NotFound, match=upload.id):
        uploads.adopt(files, upload)


def test_adopt_and_open_part_of_a_shortened_file_raise_not_found(database: Database, files: FileStore):
    upload = appended(database, files, created(database), CONTENT[:400])
    files.upload_path(upload.id).write_bytes(CONTENT[:399])
    with pytest.raises(NotFound, match=upload.id):
        uploads.adopt(files, upload)
    with pytest.raises(NotFound, match=upload.id), uploads.open_part(files, upload):
        pass


def test_open_part_syncs_the_file_and_then_the_folder(
    database: Database, files: FileStore, monkeypatch: pytest.MonkeyPatch
):
    upload, synced, fsync = created(database), [], os.fsync
    make_folder(files.upload_path(upload.id).parent)

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    upload = appended(database, files, upload, CONTENT[:400])
    assert [name for name in synced if name in (upload.id, "uploads")] == [upload.id, "uploads"]


def test_append_to_a_complete_upload_raises_offset_conflict(database: Database, files: FileStore):
    done = completed(database, files, appended(database, files, created(database), CONTENT))
    with pytest.raises(OffsetConflict), database.begin() as connection:
        uploads.append(connection, "ours", done.id, offset=done.offset, length=1)


def test_complete_with_another_size_raises_blob_mismatch(database: Database):
    upload = created(database)
    with pytest.raises(BlobMismatch), database.begin() as connection:
        uploads.complete(connection, "ours", upload.id, Blob(DIGEST, 5))


def test_get_finds_an_upload_in_its_project_only(database: Database):
    upload = created(database)
    with database.connect() as connection:
        assert uploads.get(connection, "ours", upload.id) == upload
        with pytest.raises(NotFound, match=f"no upload '{upload.id}'"):
            uploads.get(connection, "theirs", upload.id)
