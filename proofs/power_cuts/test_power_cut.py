"""Power cuts after each acknowledged write, and at each step towards it.

Rows and files are on separate disks: on a common one, SQLite's fsync would write the journal for the files as well, and
so hide a missing fsync of theirs.
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from base.files import write_text
from store import checkpoints, lifecycle, uploads
from store.artifacts import NewArtifact
from store.database import Database, migrate
from store.file_store import FileStore
from store.lifecycle import Claim
from tests.disks import Disk, disk, with_disks
from tests.store.helpers import running, submitted

CONTENT = b"weights" * 20_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ROWS = "distillery.db"


class AfterCut:
    """The rows and files after a power cut, read without the store's code."""

    def __init__(self, rows: Path, files: Path) -> None:
        self._rows, self.files = rows, files

    def query(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._rows / ROWS)) as connection:
            return connection.execute(sql, parameters).fetchall()

    def check(self) -> None:
        """Every file under its final name is complete, and every file that a row names is there."""
        assert self.query("PRAGMA integrity_check") == [("ok",)]
        for path in self.files.glob("blobs/*/[!.]*"):
            assert _sha256(path) == path.name
        for path, sha256 in self.query("SELECT path, sha256 FROM checkpoints"):
            assert _sha256(self.files / path) == sha256
        for (sha256,) in self.query("SELECT sha256 FROM artifacts"):
            assert self.blob(sha256).is_file()
        for upload_id, offset in self.query("SELECT id, offset FROM uploads WHERE status = 'open' AND offset > 0"):
            path = self.files / "uploads" / upload_id
            # Between the move among the blobs and the update of the row, the file is a blob.
            path = path if path.exists() else self.blob(DIGEST)
            assert path.read_bytes()[:offset] == CONTENT[:offset]

    def blob(self, sha256: str) -> Path:
        return self.files / "blobs" / sha256[:2] / sha256


class Service:
    """A service's database and files, each on a disk of its own."""

    def __init__(self, rows: Disk, files: Disk) -> None:
        self._rows_disk, self._files_disk = rows, files
        migrate(f"sqlite:///{rows.folder / ROWS}")
        self.database = Database(f"sqlite:///{rows.folder / ROWS}")
        self.files = FileStore(files.folder)
        self.cuts = 0

    @contextmanager
    def cut(self) -> Iterator[AfterCut]:
        self.cuts += 1
        with self._rows_disk.cut() as rows, self._files_disk.cut() as files:
            after = AfterCut(rows, files)
            after.check()
            yield after

    def cut_at_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut the power after each call that renames a file or makes bytes durable."""
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._then_cut(getattr(owner, name)))

    def _then_cut(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def step_then_cut(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            with self.cut():
                return result

        return step_then_cut


@contextmanager
def service_on_disks(place: Path) -> Iterator[Service]:
    with disk(place / "rows") as rows, disk(place / "files") as files:
        service = Service(rows, files)
        try:
            yield service
        finally:
            service.database.dispose()


@with_disks
def test_migrate_and_submit_survive_a_power_cut(tmp_path: Path):
    with service_on_disks(tmp_path) as service:
        with service.cut() as after:
            assert after.query("SELECT count(*) FROM jobs") == [(0,)]
        accepted: list[str] = []
        for _ in range(5):
            accepted.append(submitted(service.database).id)
            with service.cut() as after:
                assert [job_id for (job_id,) in after.query("SELECT id FROM jobs ORDER BY created_at, id")] == accepted
                assert after.query("SELECT count(*) FROM job_events") == [(len(accepted),)]


@with_disks
def test_put_checkpoint_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with service_on_disks(tmp_path) as service:
        claim = running(service.database)
        source = written(tmp_path / "source")
        service.cut_at_every_step(monkeypatch)
        for step in (10, 20):
            path = stored_checkpoint(service, claim, step, source)
            with service.cut() as after:
                assert _sha256(after.files / path) == DIGEST
            recorded(service, claim, step, path)
            with service.cut() as after:
                assert after.query("SELECT path FROM checkpoints WHERE step = ?", step) == [(path,)]
                assert after.query("SELECT checkpoint_step FROM jobs") == [(step,)]
        assert service.cuts > 10


@with_disks
def test_put_file_and_finish_succeeded_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with service_on_disks(tmp_path) as service:
        claim = running(service.database)
        source = written(tmp_path / "student")
        service.cut_at_every_step(monkeypatch)
        blob = service.files.put_file(source)
        with service.cut() as after:
            assert _sha256(after.blob(DIGEST)) == DIGEST
        student = NewArtifact("student.safetensors", blob.sha256, blob.bytes, "application/octet-stream")
        with service.database.begin() as connection:
            assert lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {"gain": 0.02}, [student])
        with service.cut() as after:
            assert after.query("SELECT status FROM jobs") == [("succeeded",)]
            assert after.query("SELECT name, sha256 FROM artifacts") == [("student.safetensors", DIGEST)]
        assert service.cuts > 5


@with_disks
def test_upload_parts_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`check` compares the bytes before the row's offset with what was sent."""
    with service_on_disks(tmp_path) as service:
        with service.database.begin() as connection:
            upload = uploads.create(connection, "ours", bytes=len(CONTENT), sha256=DIGEST)
        service.cut_at_every_step(monkeypatch)
        for part in (CONTENT[:50_000], CONTENT[50_000:]):
            with uploads.open_part(service.files, upload) as file:
                file.write(part)
            with service.database.begin() as connection:
                upload = uploads.append(connection, "ours", upload.id, offset=upload.offset, length=len(part))
            with service.cut() as after:
                assert after.query("SELECT offset FROM uploads") == [(upload.offset,)]
        blob = uploads.adopt(service.files, upload)
        with service.cut() as after:
            assert _sha256(after.blob(DIGEST)) == DIGEST
        with service.database.begin() as connection:
            uploads.complete(connection, "ours", upload.id, blob)
        with service.cut() as after:
            assert after.query("SELECT status, sha256 FROM uploads") == [("complete", DIGEST)]


@with_disks
def test_unacknowledged_upload_bytes_do_not_come_back(tmp_path: Path):
    """A broken part left bytes after the row's offset; the blob has none of them."""
    with service_on_disks(tmp_path) as service:
        with service.database.begin() as connection:
            upload = uploads.create(connection, "ours")
        with uploads.open_part(service.files, upload) as file:
            file.write(CONTENT + b"never acknowledged")
        with service.database.begin() as connection:
            upload = uploads.append(connection, "ours", upload.id, offset=0, length=len(CONTENT))
        assert uploads.adopt(service.files, upload).sha256 == DIGEST
        with service.cut() as after:
            assert _sha256(after.blob(DIGEST)) == DIGEST


@with_disks
def test_write_text_survives_a_power_cut(tmp_path: Path):
    with disk(tmp_path / "scratch") as scratch:
        written = write_text(scratch.folder / "out" / "report.json", "{}")
        with scratch.cut() as after:
            assert _sha256(after / "out" / "report.json") == written.sha256


@with_disks
def test_power_cut_loses_what_was_not_synced(tmp_path: Path):
    """These disks lose what real disks lose; otherwise the tests above would prove nothing."""
    with disk(tmp_path / "files") as files:
        write_text(files.folder / "synced and renamed", "{}")
        for name in ("renamed, not synced", "synced, folder not synced"):
            temporary = files.folder / f"{name}.tmp"
            with temporary.open("wb") as file:
                file.write(CONTENT)
                if name.startswith("synced"):
                    os.fsync(file.fileno())
            temporary.replace(files.folder / name)
        with files.cut() as after:
            left = {path.name: path.stat().st_size for path in after.iterdir() if path.is_file()}
        assert left == {
            "synced and renamed": 2,
            "renamed, not synced": 0,
            "synced, folder not synced.tmp": len(CONTENT),
        }


def written(path: Path) -> Path:
    path.write_bytes(CONTENT)
    return path


def stored_checkpoint(service: Service, claim: Claim, step: int, source: Path) -> str:
    service.files.put_checkpoint(claim.job.id, claim.fence, step, source, DIGEST)
    return service.files.relative(service.files.checkpoint_path(claim.job.id, claim.fence, step))


def recorded(service: Service, claim: Claim, step: int, path: str) -> None:
    named = {"step": step, "sha256": DIGEST, "bytes": len(CONTENT), "path": path}
    with service.database.begin() as connection:
        checkpoints.record(connection, claim.job.id, claim.fence, **named)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
