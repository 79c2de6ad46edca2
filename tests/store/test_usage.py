"""What uses how much: files of all projects by folder, rows of one project by kind."""

from pathlib import Path

import pytest
from sqlalchemy import insert

from store import tables, uploads, usage
from store.database import Database
from store.file_store import Blob, FileStore, Usage
from store.records import database_now


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def test_of_all_counts_files_by_folder(files: FileStore, tmp_path: Path):
    cache = tmp_path / "cache"
    sha256 = files.put_stream([b"1234"]).sha256
    files.put_stream([b"12345"])
    files.move_to_trash(sha256, unused_since=files.now())
    (cache / "digits").mkdir(parents=True)
    (cache / "digits" / "pixels.npy").write_bytes(b"123")
    (cache / "digits.lock").touch()
    nothing = Usage(0, 0)
    assert usage.of_all(files, cache) == {
        "blobs": Usage(1, 5),
        "checkpoints": nothing,
        "logs": nothing,
        "uploads": nothing,
        "trash": Usage(1, 4),
        "cache": Usage(2, 3),
    }


def sent(database: Database, files: FileStore, project: str, content: bytes) -> Blob:
    """Upload bytes as a project."""
    with database.begin() as connection:
        upload = uploads.create(connection, project)
    with uploads.open_part(files, upload) as file:
        file.write(content)
    with database.begin() as connection:
        upload = uploads.append(connection, project, upload.id, offset=0, length=len(content))
        blob = uploads.adopt(files, upload)
        uploads.complete(connection, project, upload.id, blob)
    return blob


def test_of_project_counts_what_its_rows_name_and_the_same_bytes_once(database: Database, files: FileStore):
    blob = sent(database, files, "ours", b"weights")
    sent(database, files, "ours", b"weights")
    sent(database, files, "theirs", b"their own bytes")
    row = {"project": "ours", "sha256": blob.sha256, "state": "ready", "warnings": []}
    with database.begin() as connection:
        for name in ("one", "two"):
            values = {**row, "id": f"mdl_{name}", "name": name}
            connection.execute(insert(tables.models).values(**values, created_at=database_now()))
        lost = {**row, "id": "ds_lost", "name": "lost", "sha256": "0" * 64}
        connection.execute(insert(tables.datasets).values(**lost, created_at=database_now()))
        open_upload = uploads.create(connection, "ours", bytes=100)
        uploads.append(connection, "ours", open_upload.id, offset=0, length=30)
    nothing = Usage(0, 0)
    assert usage.of_project(database, files, "ours") == {
        "uploads": Usage(1, 7), "open_uploads": Usage(1, 30), "artifacts": nothing, "checkpoints": nothing,
        "models": Usage(1, 7), "datasets": nothing,
    }  # fmt: skip
    assert usage.of_project(database, files, "nobody's") == dict.fromkeys(
        ("uploads", "open_uploads", "artifacts", "checkpoints", "models", "datasets"), nothing
    )
