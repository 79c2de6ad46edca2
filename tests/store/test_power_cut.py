"""The plug is pulled after each write that was acknowledged, and at each step on the way there.

Rows and files lie on a disk each: on one, SQLite's fsync would write the journal for the files as well, and hide it
where one of theirs is missing.
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
from store.blobs import BlobStore
from store.database import Database, migrate
from store.lifecycle import Claim
from tests.store.disks import Disk, disk, with_disks
from tests.store.scene import running, submitted

CONTENT = b"weights" * 20_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ROWS = "distillery.db"


class Found:
    """What is there when the power is back, read by SQL and digests of our own."""

    def __init__(self, rows: Path, files: Path) -> None:
        self._rows, self.files = rows, files

    def ask(self, question: str, *given: object) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._rows / ROWS)) as connection:
            return connection.execute(question, given).fetchall()

    def must_be_whole(self) -> None:
        """No file under its final name is torn, and no row promises a file that is not there."""
        assert self.ask("PRAGMA integrity_check") == [("ok",)]
        for path in self.files.glob("blobs/*/[!.]*"):
            assert _sha256(path) == path.name
        for path, sha256 in self.ask("SELECT path, sha256 FROM checkpoints"):
            assert _sha256(self.files / path) == sha256
        for (sha256,) in self.ask("SELECT sha256 FROM artifacts"):
            assert self.blob(sha256).is_file()
        for upload_id, offset in self.ask("SELECT id, offset FROM uploads WHERE status = 'open' AND offset > 0"):
            came_in = self.files / "uploads" / upload_id
            # Between the move among the blobs and the row that says so, it is found there.
            kept = came_in if came_in.exists() else self.blob(DIGEST)
            assert kept.read_bytes()[:offset] == CONTENT[:offset]

    def blob(self, sha256: str) -> Path:
        return self.files / "blobs" / sha256[:2] / sha256


class Scene:
    """A service's database and files, each on a disk of its own."""

    def __init__(self, rows: Disk, files: Disk) -> None:
        self._rows_disk, self._files_disk = rows, files
        migrate(f"sqlite:///{rows.folder / ROWS}")
        self.database = Database(f"sqlite:///{rows.folder / ROWS}")
        self.files = BlobStore(files.folder)
        self.cuts = 0

    @contextmanager
    def cut(self) -> Iterator[Found]:
        self.cuts += 1
        with self._rows_disk.cut() as rows, self._files_disk.cut() as files:
            found = Found(rows, files)
            found.must_be_whole()
            yield found

    def cut_at_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After each call that changes names or makes bytes durable."""
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._then_cut(getattr(owner, name)))

    def _then_cut(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*given: Any, **named: Any) -> Any:
            answer = step(*given, **named)
            with self.cut():
                return answer

        return stepped


@contextmanager
def scene(place: Path) -> Iterator[Scene]:
    with disk(place / "rows") as rows, disk(place / "files") as files:
        made = Scene(rows, files)
        try:
            yield made
        finally:
            made.database.dispose()


@with_disks
def test_a_migrated_database_and_every_accepted_job_are_there(tmp_path: Path):
    with scene(tmp_path) as service:
        with service.cut() as found:
            assert found.ask("SELECT count(*) FROM jobs") == [(0,)]
        accepted: list[str] = []
        for _ in range(5):
            accepted.append(submitted(service.database).id)
            with service.cut() as found:
                assert [job_id for (job_id,) in found.ask("SELECT id FROM jobs ORDER BY created_at, id")] == accepted
                assert found.ask("SELECT count(*) FROM job_events") == [(len(accepted),)]


@with_disks
def test_a_checkpoint_that_was_stored_is_there_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with scene(tmp_path) as service:
        claim = running(service.database)
        source = written(tmp_path / "engine's")
        service.cut_at_every_step(monkeypatch)
        for step in (10, 20):
            path = stored_checkpoint(service, claim, step, source)
            with service.cut() as found:
                assert _sha256(found.files / path) == DIGEST
            recorded(service, claim, step, path)
            with service.cut() as found:
                assert found.ask("SELECT path FROM checkpoints WHERE step = ?", step) == [(path,)]
                assert found.ask("SELECT checkpoint_step FROM jobs") == [(step,)]
        assert service.cuts > 10


@with_disks
def test_a_published_result_is_there_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with scene(tmp_path) as service:
        claim = running(service.database)
        source = written(tmp_path / "student")
        service.cut_at_every_step(monkeypatch)
        blob = service.files.put_file(source)
        with service.cut() as found:
            assert _sha256(found.blob(DIGEST)) == DIGEST
        student = NewArtifact("student.safetensors", blob.sha256, blob.bytes, "application/octet-stream")
        with service.database.begin() as connection:
            assert lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {"gain": 0.02}, [student])
        with service.cut() as found:
            assert found.ask("SELECT status FROM jobs") == [("succeeded",)]
            assert found.ask("SELECT name, sha256 FROM artifacts") == [("student.safetensors", DIGEST)]
        assert service.cuts > 5


@with_disks
def test_every_acknowledged_part_of_an_upload_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`must_be_whole` compares the bytes before the row's offset with what was sent."""
    with scene(tmp_path) as service:
        with service.database.begin() as connection:
            upload = uploads.create(connection, "ours", bytes=len(CONTENT), sha256=DIGEST)
        service.cut_at_every_step(monkeypatch)
        for part in (CONTENT[:50_000], CONTENT[50_000:]):
            with uploads.part(service.files, upload) as file:
                file.write(part)
            with service.database.begin() as connection:
                upload = uploads.append(connection, "ours", upload.id, offset=upload.offset, length=len(part))
            with service.cut() as found:
                assert found.ask("SELECT offset FROM uploads") == [(upload.offset,)]
        blob = uploads.adopt(service.files, upload)
        with service.cut() as found:
            assert _sha256(found.blob(DIGEST)) == DIGEST
        with service.database.begin() as connection:
            uploads.complete(connection, "ours", upload.id, blob)
        with service.cut() as found:
            assert found.ask("SELECT status, sha256 FROM uploads") == [("complete", DIGEST)]


@with_disks
def test_what_was_never_acknowledged_of_an_upload_does_not_come_back(tmp_path: Path):
    """A part that broke off left bytes behind the row's offset; the blob holds none of them."""
    with scene(tmp_path) as service:
        with service.database.begin() as connection:
            upload = uploads.create(connection, "ours")
        with uploads.part(service.files, upload) as file:
            file.write(CONTENT + b"never acknowledged")
        with service.database.begin() as connection:
            upload = uploads.append(connection, "ours", upload.id, offset=0, length=len(CONTENT))
        assert uploads.adopt(service.files, upload).sha256 == DIGEST
        with service.cut() as found:
            assert _sha256(found.blob(DIGEST)) == DIGEST


@with_disks
def test_what_the_engine_writes_whole_is_there(tmp_path: Path):
    with disk(tmp_path / "scratch") as scratch:
        written = write_text(scratch.folder / "out" / "report.json", "{}")
        with scratch.cut() as found:
            assert _sha256(found / "out" / "report.json") == written.sha256


@with_disks
def test_a_cut_takes_what_nobody_made_durable(tmp_path: Path):
    """These disks do lose what real ones lose, or the tests above would prove nothing."""
    with disk(tmp_path / "files") as files:
        write_text(files.folder / "kept", "{}")
        for name in ("named, not synced", "synced, not named"):
            temporary = files.folder / f"{name}.tmp"
            with temporary.open("wb") as file:
                file.write(CONTENT)
                if name.startswith("synced"):
                    os.fsync(file.fileno())
            temporary.replace(files.folder / name)
        with files.cut() as found:
            left = {path.name: path.stat().st_size for path in found.iterdir() if path.is_file()}
        assert left == {"kept": 2, "named, not synced": 0, "synced, not named.tmp": len(CONTENT)}


def written(path: Path) -> Path:
    path.write_bytes(CONTENT)
    return path


def stored_checkpoint(service: Scene, claim: Claim, step: int, source: Path) -> str:
    service.files.put_checkpoint(claim.job.id, claim.fence, step, source, DIGEST)
    return service.files.relative(service.files.checkpoint_path(claim.job.id, claim.fence, step))


def recorded(service: Scene, claim: Claim, step: int, path: str) -> None:
    named = {"step": step, "sha256": DIGEST, "bytes": len(CONTENT), "path": path}
    with service.database.begin() as connection:
        checkpoints.record(connection, claim.job.id, claim.fence, **named)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
