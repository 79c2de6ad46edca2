import hashlib
import os
from pathlib import Path

import pytest

from base.files import make_folder
from store import uploads
from store.blobs import Blob, BlobStore
from store.database import Database
from store.errors import BlobMismatch, NotFound, OffsetConflict, UploadBusy
from store.uploads import Upload

CONTENT = b"0123456789" * 100
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def files(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "files")


def created(database: Database, bytes: int | None = None, sha256: str | None = None) -> Upload:
    with database.begin() as connection:
        return uploads.create(connection, "ours", filename="teacher.pt", bytes=bytes, sha256=sha256)


def sent(database: Database, files: BlobStore, upload: Upload, content: bytes) -> Upload:
    with uploads.part(files, upload) as file:
        file.write(content)
    with database.begin() as connection:
        return uploads.append(connection, "ours", upload.id, offset=upload.offset, length=len(content))


def completed(database: Database, files: BlobStore, upload: Upload) -> Upload:
    blob = uploads.adopt(files, upload)
    with database.begin() as connection:
        return uploads.complete(connection, "ours", upload.id, blob)


def test_parts_become_a_blob(database: Database, files: BlobStore):
    upload = created(database, len(CONTENT), DIGEST)
    assert (upload.status, upload.offset, upload.filename) == ("open", 0, "teacher.pt")
    for part in (CONTENT[:400], CONTENT[400:]):
        upload = sent(database, files, upload, part)
    done = completed(database, files, upload)
    assert (done.status, done.bytes, done.sha256) == ("complete", len(CONTENT), DIGEST)
    assert files.path(DIGEST).read_bytes() == CONTENT
    assert not files.upload_path(upload.id).exists()


def test_what_was_announced_by_nobody_is_found(database: Database, files: BlobStore):
    done = completed(database, files, sent(database, files, created(database), CONTENT))
    assert (done.bytes, done.sha256) == (len(CONTENT), DIGEST)


def test_a_part_cut_off_is_sent_again_from_the_offset_of_the_row(database: Database, files: BlobStore):
    upload = sent(database, files, created(database, len(CONTENT), DIGEST), CONTENT[:400])
    with pytest.raises(ConnectionResetError), uploads.part(files, upload) as file:
        file.write(b"torn" * 500)
        raise ConnectionResetError
    assert completed(database, files, sent(database, files, upload, CONTENT[400:])).sha256 == DIGEST


def test_a_part_for_another_place_is_refused_with_the_right_one(database: Database, files: BlobStore):
    upload = sent(database, files, created(database), CONTENT[:400])
    with pytest.raises(OffsetConflict, match="goes on at byte 400, not at 0"), database.begin() as connection:
        uploads.append(connection, "ours", upload.id, offset=0, length=10)


def test_two_parts_at_once_cannot_mix(database: Database, files: BlobStore):
    upload = created(database)
    with uploads.part(files, upload):
        with pytest.raises(UploadBusy), uploads.part(files, upload):
            pass
        with pytest.raises(UploadBusy):
            uploads.adopt(files, upload)


def test_a_stale_request_cannot_shorten_what_is_acknowledged(database: Database, files: BlobStore):
    stale = created(database, len(CONTENT), DIGEST)
    upload = sent(database, files, stale, CONTENT)
    with uploads.part(files, stale) as file:
        file.write(CONTENT[:5])
    assert completed(database, files, upload).sha256 == DIGEST


@pytest.mark.parametrize(
    ("announced", "told"),
    [((len(CONTENT) + 1, None), "announced 1001 bytes, found 1000 bytes"), ((None, "00" * 32), f"found {DIGEST}")],
    ids=["size", "digest"],
)
def test_what_is_not_as_announced_becomes_no_blob(
    database: Database, files: BlobStore, announced: tuple[int | None, str | None], told: str
):
    upload = sent(database, files, created(database, *announced), CONTENT)
    with pytest.raises(BlobMismatch, match=told):
        uploads.adopt(files, upload)
    assert not files.exists(DIGEST)


def test_completing_twice_is_completing_once(database: Database, files: BlobStore):
    upload = sent(database, files, created(database, len(CONTENT), DIGEST), CONTENT)
    first = completed(database, files, upload)
    assert completed(database, files, first) == completed(database, files, upload) == first


def test_bytes_that_are_gone_are_not_made_up(database: Database, files: BlobStore):
    upload = sent(database, files, created(database), CONTENT)
    uploads.discard(files, upload.id)
    with pytest.raises(NotFound, match=upload.id):
        uploads.adopt(files, upload)


def test_acknowledged_bytes_that_are_gone_are_not_made_up_of_zeros(database: Database, files: BlobStore):
    upload = sent(database, files, created(database), CONTENT[:400])
    files.upload_path(upload.id).write_bytes(CONTENT[:399])
    with pytest.raises(NotFound, match=upload.id):
        uploads.adopt(files, upload)
    with pytest.raises(NotFound, match=upload.id), uploads.part(files, upload):
        pass


def test_the_first_part_is_durable_under_its_name(
    database: Database, files: BlobStore, monkeypatch: pytest.MonkeyPatch
):
    """Its bytes first, then the folder that names it."""
    upload, done, fsync = created(database), [], os.fsync
    make_folder(files.upload_path(upload.id).parent)

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)

    monkeypatch.setattr(os, "fsync", noted)
    upload = sent(database, files, upload, CONTENT[:400])
    mine = [name for name in done if name in (upload.id, "uploads")]
    assert mine == [upload.id, "uploads"]


def test_nothing_is_added_to_what_is_complete(database: Database, files: BlobStore):
    done = completed(database, files, sent(database, files, created(database), CONTENT))
    with pytest.raises(OffsetConflict), database.begin() as connection:
        uploads.append(connection, "ours", done.id, offset=done.offset, length=1)


def test_another_size_than_the_rows_is_refused(database: Database):
    upload = created(database)
    with pytest.raises(BlobMismatch), database.begin() as connection:
        uploads.complete(connection, "ours", upload.id, Blob(DIGEST, 5))


def test_an_upload_is_seen_in_its_project_only(database: Database):
    upload = created(database)
    with database.connect() as connection:
        assert uploads.get(connection, "ours", upload.id) == upload
        with pytest.raises(NotFound, match=f"no upload '{upload.id}'"):
            uploads.get(connection, "theirs", upload.id)
