"""A backup of a service that runs, and a new service of it, on either database."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from store import artifacts, backup, checkpoints, events, jobs, lifecycle, metrics, tables, uploads
from store.artifacts import NewArtifact
from store.backup import BackupFault, back_up, restore
from store.database import Database
from store.file_store import FileStore
from store.records import Job
from tests.store.helpers import claimed, expire_lease, read_job, running, submitted

WEIGHTS = b"weights of a student"


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def succeeded(database: Database, files: FileStore) -> Job:
    claim = running(database)
    blob = files.put_stream([WEIGHTS])
    made = [NewArtifact("student.safetensors", blob.sha256, blob.bytes, "application/octet-stream")]
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {"accuracy": 0.25}, made)
    return read_job(database, claim.job.id)


def training(database: Database, files: FileStore, folder: Path, step: int) -> Job:
    """A job that runs, with a checkpoint, metrics and a log."""
    claim = running(database, name="läuft")
    save(database, files, folder, claim.job.id, claim.fence, step)
    with database.begin() as connection:
        metrics.record(
            connection, claim.job.id, claim.fence, trial="student", step=step, epoch=0.1, values={"loss": 1 / 3}
        )
    log = files.log_path(claim.job.id, claim.fence)
    log.parent.mkdir(parents=True)
    log.write_text("epoch 1\n")
    return read_job(database, claim.job.id)


def save(database: Database, files: FileStore, folder: Path, job_id: str, fence: int, step: int) -> None:
    source = folder / "checkpoint"
    source.write_bytes(b"state of step %d" % step)
    blob = files.put_checkpoint(job_id, fence, step, source)
    path = files.relative(files.checkpoint_path(job_id, fence, step))
    with database.begin() as connection:
        checkpoints.record(connection, job_id, fence, step=step, path=path, sha256=blob.sha256, bytes=blob.bytes)


@pytest.fixture
def restored(tmp_path: Path) -> Callable[..., tuple[Database, FileStore]]:
    """A new service of the backup, on SQLite."""

    def make(folder: Path) -> tuple[Database, FileStore]:
        url, new = f"sqlite:///{tmp_path}/new/distillery.db", FileStore(tmp_path / "new" / "files")
        restore(url, new, folder)
        return Database(url), new

    return make


def test_restore_has_jobs_files_and_a_running_job_that_continues(
    database: Database, files: FileStore, tmp_path: Path, restored: Callable[..., tuple[Database, FileStore]]
):
    done, runs = succeeded(database, files), training(database, files, tmp_path, step=7)
    queued = submitted(database, name="later")
    needless = files.put_stream([b"no row names this"])
    with database.begin() as connection:
        half = uploads.create(connection, "ours", bytes=10)
    with uploads.open_part(files, half) as file:
        file.write(b"12345")
    with database.begin() as connection:
        half = uploads.append(connection, "ours", half.id, offset=0, length=5)
    manifest = back_up(database, files, tmp_path / "backup")
    assert (manifest.rows["jobs"], manifest.files) == (3, 4)
    new, new_files = restored(tmp_path / "backup")
    for job in (done, runs, queued):
        assert read_job(new, job.id) == job
    with new.connect() as connection:
        (artifact,) = artifacts.list_artifacts(connection, done.id)
        assert connection.execute(select(tables.metrics.c.value)).scalar_one() == 1 / 3
        assert [event.type for event in events.list_events(connection, done.id, 0, 100)][-1] == "succeeded"
        assert uploads.get(connection, "ours", half.id) == half
    assert new_files.path(artifact.sha256).read_bytes() == WEIGHTS
    assert not new_files.exists(needless.sha256)
    assert new_files.upload_path(half.id).read_bytes() == b"12345"
    assert new_files.log_path(runs.id, runs.fence).read_text() == "epoch 1\n"
    expire_lease(new, runs.id)
    claim = claimed(new, takeover=True)
    assert (claim.job.id, claim.job.checkpoint_step) == (runs.id, 7)
    with new.connect() as connection:
        (checkpoint,) = checkpoints.list_checkpoints(connection, runs.id)
    assert (new_files.folder / checkpoint.path).read_bytes() == b"state of step 7"
    new.dispose()


def test_back_up_reads_the_rows_again_if_a_file_was_deleted_meanwhile(
    database: Database, files: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A training replaces its checkpoint between the reading of the rows and the copy."""
    job = training(database, files, tmp_path, step=7)
    read, calls = backup._write_rows, []

    def then_train_on(*arguments: object) -> object:
        found = read(*arguments)  # type: ignore[arg-type]
        if not calls:
            save(database, files, tmp_path, job.id, job.fence, step=8)
            files.checkpoint_path(job.id, job.fence, 7).unlink()
            with database.begin() as connection:
                rows = tables.checkpoints
                connection.execute(rows.delete().where(rows.c.step == 7))
        calls.append(found)
        return found

    monkeypatch.setattr(backup, "_write_rows", then_train_on)
    back_up(database, files, tmp_path / "backup")
    assert len(calls) == 2
    copied = [path.name for path in (tmp_path / "backup" / "files" / "checkpoints").rglob("*.pt")]
    assert copied == ["000000008.pt"]


def test_back_up_again_copies_new_files_only_and_drops_needless_ones(
    database: Database, files: FileStore, tmp_path: Path
):
    job = succeeded(database, files)
    first = back_up(database, files, tmp_path / "backup")
    with database.begin() as connection:
        jobs.delete(connection, job.id)
    training(database, files, tmp_path, step=1)
    second = back_up(database, files, tmp_path / "backup")
    assert second.rows_name != first.rows_name
    kept = [path for path in (tmp_path / "backup" / "files").rglob("*") if path.is_file()]
    assert sorted(path.parent.parent.parent.name for path in kept) == ["checkpoints", "files"], "a checkpoint and a log"
    assert [path.name for path in (tmp_path / "backup").glob("rows-*")] == [second.rows_name]
    (checkpoint,) = (path for path in kept if path.suffix == ".pt")
    before = checkpoint.stat().st_ino
    assert back_up(database, files, tmp_path / "backup") == second
    assert checkpoint.stat().st_ino == before


def test_back_up_names_a_file_that_is_missing(database: Database, files: FileStore, tmp_path: Path):
    job = succeeded(database, files)
    with database.connect() as connection:
        (artifact,) = artifacts.list_artifacts(connection, job.id)
    path = files.path(artifact.sha256)
    path.write_bytes(b"damaged")
    with pytest.raises(BackupFault, match=f"lacks 1 files .* damaged: blobs/.*{artifact.sha256}"):
        back_up(database, files, tmp_path / "backup")
    assert not (tmp_path / "backup" / "manifest.json").exists()


def test_restore_of_sqlite_into_postgres(sqlite_database_url: str, postgres_database_url: str, tmp_path: Path):
    old, files = Database(sqlite_database_url), FileStore(tmp_path / "files")
    job = succeeded(old, files)
    back_up(old, files, tmp_path / "backup")
    old.dispose()
    restore(postgres_database_url, FileStore(tmp_path / "new"), tmp_path / "backup")
    new = Database(postgres_database_url)
    assert read_job(new, job.id) == job
    new.dispose()
    with pytest.raises(BackupFault, match=r"has rows already, in .*jobs"):
        restore(postgres_database_url, FileStore(tmp_path / "new"), tmp_path / "backup")


@pytest.mark.parametrize("damage", ["no manifest", "other rows", "a file less", "another blob"])
def test_restore_refuses_a_damaged_backup(
    sqlite_database_url: str, tmp_path: Path, damage: str, restored: Callable[..., tuple[Database, FileStore]]
):
    database, files = Database(sqlite_database_url), FileStore(tmp_path / "files")
    succeeded(database, files)
    folder = tmp_path / "backup"
    manifest = back_up(database, files, folder)
    database.dispose()
    (blob,) = (path for path in (folder / "files" / "blobs").rglob("*") if path.is_file())
    match damage:
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "other rows":
            (folder / manifest.rows_name).write_bytes(b"")
        case "a file less":
            blob.unlink()
        case "another blob":
            blob.write_bytes(b"evil")
    with pytest.raises(BackupFault):
        restored(folder)
    assert not (tmp_path / "new" / "distillery.db").exists()
