"""The files that the collector deletes, and those that it must not delete. `in_days` sets the file store's clock."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from base import failpoints
from base.errors import DatabaseUnavailable, StorageFull
from store import audit, checkpoints, collections, collector, jobs, lifecycle, projects, registry, tables, uploads
from store.artifacts import NewArtifact
from store.collector import Collector, Retention, collect, free_blob, named_digests
from store.database import Database
from store.file_store import FileStore
from store.records import Job, database_now, new_id
from store.registry import NewEntry
from tests.store.helpers import ERROR, claimed, expire_lease, read_job, running, submitted

DAY = 86_400.0
RETENTION = Retention(after_s=DAY, checkpoints_s=7 * DAY, uploads_s=7 * DAY, open_uploads_s=DAY, inspections_s=30 * DAY)


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


@pytest.fixture
def in_days(files: FileStore, database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Collector]:
    """Run a collection that many days from now, by the file store's clock."""
    monkeypatch.setattr(collector, "PAUSE_S", 0)

    def run(days: float, **options: Any) -> Collector:
        monkeypatch.setattr(files, "now", lambda: time.time() + days * DAY)
        collection = Collector(database, files, RETENTION, **options)
        collection.run()
        return collection

    return run


@pytest.fixture
def settled(database: Database) -> None:
    """The database has had collections for longer than a day."""
    with database.begin() as connection:
        row = {"id": new_id("col"), "host": "here", "began_at": database_now() - 2 * DAY}
        connection.execute(insert(tables.collections).values(**row))


def put(files: FileStore, content: str) -> str:
    return files.put_stream([content.encode()]).sha256


def place(files: FileStore, sha256: str) -> str:
    """Return where a blob is. It is looked up on the disk, because `files.path` would restore it."""
    paths = {"blobs": files.folder / "blobs" / sha256[:2] / sha256, "trash": files.folder / "trash" / sha256}
    return " and ".join(name for name, path in paths.items() if path.exists()) or "deleted"


def succeeded(database: Database, sha256: str) -> Job:
    claim = running(database)
    made = [NewArtifact("student.safetensors", sha256, 1, "application/octet-stream")]
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, made)
    return read_job(database, claim.job.id)


def failed(database: Database, days_ago: float) -> Job:
    claim = running(database)
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, 1, step=5, sha256="5" * 64, bytes=1, path=path_of(claim.job.id, 5))
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, None)
        ended = update(tables.jobs).where(tables.jobs.c.id == claim.job.id)
        connection.execute(ended.values(finished_at=database_now() - days_ago * DAY))
    return read_job(database, claim.job.id)


def path_of(job_id: str, step: int, fence: int = 1) -> str:
    return f"checkpoints/{job_id}/{fence}/{step:09d}.pt"


def checkpoint(files: FileStore, tmp_path: Path, job_id: str, step: int, fence: int = 1) -> Path:
    source = tmp_path / "state.pt"
    source.write_bytes(b"state")
    files.put_checkpoint(job_id, fence, step, source)
    return files.checkpoint_path(job_id, fence, step)


def log_of(files: FileStore, job_id: str) -> Path:
    path = files.log_path(job_id, 1)
    path.parent.mkdir(parents=True)
    path.write_text("epoch 1")
    return path


def delete(database: Database, job_id: str) -> None:
    with database.begin() as connection:
        jobs.delete(connection, job_id)


# ── blobs ──


def test_fill_trash_after_a_day_and_empty_trash_after_another(files: FileStore, in_days: Any):
    sha256 = put(files, "not named")
    assert in_days(0.9).removed == {}
    assert in_days(1.1).removed == {"to_trash": {"count": 1, "bytes": 9}}
    assert place(files, sha256) == "trash"
    assert in_days(0.9).removed == {}
    assert in_days(1.1).removed == {"blobs": {"count": 1, "bytes": 9}}
    assert place(files, sha256) == "deleted"


def test_empty_trash_counts_from_the_move(files: FileStore, in_days: Any):
    """However old the file is: a process may have found it just before the move."""
    sha256 = put(files, "years old")
    os.utime(files.folder / "blobs" / sha256[:2] / sha256, (0, 0))
    assert list(in_days(0).removed) == ["to_trash"]
    assert in_days(0.9).removed == {}
    assert list(in_days(1.1).removed) == ["blobs"]


def name_by_artifact(database: Database, sha256: str) -> None:
    succeeded(database, sha256)


def name_by_model(database: Database, sha256: str) -> None:
    with database.begin() as connection:
        registry.models.register(connection, NewEntry("ours", "resnet", sha256, {}, {}), "server", 30.0)


def name_by_dataset(database: Database, sha256: str) -> None:
    with database.begin() as connection:
        registry.datasets.register(connection, NewEntry("ours", "flowers", sha256, {}, {}), "server", 30.0)


def name_by_thumbnails(database: Database, sha256: str) -> None:
    with database.begin() as connection:
        new = NewEntry("ours", "flowers", "0" * 64, {}, {})
        entry = registry.datasets.register(connection, new, "server", 30.0)
        sheet = {"sha256": sha256, "side": 8, "columns": 1, "classes": [0]}
        registry.datasets.finish(connection, entry, "server", {"facts": {}, "thumbnails": sheet})


def name_by_upload(database: Database, sha256: str) -> None:
    with database.begin() as connection:
        uploads.create(connection, "ours", sha256=sha256)


def name_by_job(database: Database, sha256: str) -> None:
    teachers = [{"checkpoint": "weights:resnet50"}, {"program": f"blob:sha256:{sha256}"}]
    submitted(database, resolved_spec={"method": {"name": "kd"}, "teacher": teachers})


def name_by_last_of_many_jobs(database: Database, sha256: str) -> None:
    for _ in range(4):
        submitted(database, resolved_spec={"dataset": {"source": f"blob:sha256:{'0' * 64}"}})
    submitted(database, resolved_spec={"dataset": {"source": f"blob:sha256:{sha256}"}})


NAMERS = [
    name_by_artifact,
    name_by_model,
    name_by_dataset,
    name_by_thumbnails,
    name_by_upload,
    name_by_job,
    name_by_last_of_many_jobs,
]


@pytest.mark.parametrize("name_it", NAMERS)
def test_fill_trash_spares_what_a_row_names(
    database: Database, files: FileStore, in_days: Any, name_it: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collector, "BATCH", 2)
    sha256, other = put(files, "named"), put(files, "not named")
    name_it(database, sha256)
    in_days(30)
    in_days(60)
    assert (place(files, sha256), place(files, other)) == ("blobs", "deleted")


def test_fill_trash_takes_what_only_an_inspection_names(database: Database, files: FileStore, in_days: Any):
    sha256 = put(files, "inspected once")
    with database.begin() as connection:
        row = {"digest": sha256, "kind": "model", "key": "", "facts": {}}
        connection.execute(insert(tables.inspections).values(**row, seen_at=database_now()))
    in_days(2)
    assert place(files, sha256) == "trash"


@pytest.mark.parametrize("name_it", NAMERS)
def test_empty_trash_restores_what_a_row_names_later(database: Database, files: FileStore, in_days: Any, name_it: Any):
    sha256 = put(files, "named late")
    in_days(2)
    name_it(database, sha256)
    assert place(files, sha256) == "trash"
    assert in_days(2).removed == {"brought_back": {"count": 1, "bytes": 10}}
    assert place(files, sha256) == "blobs"


def test_fill_trash_restores_what_a_row_names_meanwhile(
    database: Database, files: FileStore, in_days: Any, monkeypatch: pytest.MonkeyPatch
):
    sha256 = put(files, "just in time")
    move_to_trash = files.move_to_trash

    def move_then_name(*arguments: Any) -> bool:
        moved = move_to_trash(*arguments)
        name_by_model(database, sha256)
        return moved

    monkeypatch.setattr(files, "move_to_trash", move_then_name)
    removed = in_days(2).removed
    assert removed["brought_back"] == {"count": 1, "bytes": 12}
    assert place(files, sha256) == "blobs"


def test_fill_trash_counts_from_the_last_use(files: FileStore, in_days: Any):
    """A request that has found the blob has a day to name it in a row."""
    sha256 = put(files, "used lately")
    os.utime(files.path(sha256), (0, 0))
    assert files.exists(sha256)
    assert in_days(0.9).removed == {}
    os.utime(files.folder / "blobs" / sha256[:2] / sha256, (0, 0))
    assert list(in_days(0.9).removed) == ["to_trash"]


def test_forget_blobs_takes_what_a_project_has_not_named_for_a_day(database: Database, in_days: Any):
    named, unnamed = "1" * 64, "2" * 64
    submitted(database, resolved_spec={"dataset": {"source": f"blob:sha256:{named}"}})
    with database.begin() as connection:
        projects.add_blobs(connection, "ours", [unnamed])
        projects.add_blobs(connection, "theirs", [named])

    def left() -> set[tuple[str, str]]:
        rows = tables.project_blobs.c
        with database.connect() as connection:
            return {(project, sha256) for project, sha256 in connection.execute(select(rows.project, rows.sha256))}

    in_days(0)
    assert len(left()) == 3, "a request may just have found it"
    with database.begin() as connection:
        connection.execute(update(tables.project_blobs).values(seen_at=database_now() - 2 * DAY))
    in_days(0, dry_run=True)
    assert len(left()) == 3
    in_days(0)
    assert left() == {("ours", named)}, "another project's name does not count"


def test_named_digests_finds_a_name_that_moves_between_rows(database: Database, monkeypatch: pytest.MonkeyPatch):
    """A job is registered as a model and deleted: in separate transactions, neither row would have the name."""
    sha256 = "d" * 64
    job = succeeded(database, "0" * 64)
    with database.begin() as connection:
        spec = {"teacher": {"checkpoint": f"blob:sha256:{sha256}"}}
        connection.execute(update(tables.jobs).values(resolved_spec=spec))
    named = collector.named_in
    moved = []

    def named_with_a_move(connection: Any) -> Iterator[Any]:
        for number, digests in enumerate(named(connection)):
            yield digests
            if number == 3:
                name_by_model(database, sha256)
                delete(database, job.id)
                moved.append(sha256)

    monkeypatch.setattr(collector, "named_in", named_with_a_move)
    assert sha256 in named_digests(database)
    assert moved


def test_empty_trash_deletes_the_copy_of_a_blob_that_was_put_again(
    database: Database, files: FileStore, in_days: Any, monkeypatch: pytest.MonkeyPatch
):
    sha256 = put(files, "twice")
    in_days(2)
    monkeypatch.undo()
    put(files, "twice")
    name_by_model(database, sha256)
    assert place(files, sha256) == "blobs and trash"
    in_days(2)
    assert place(files, sha256) == "blobs"


# ── what belongs to jobs ──


def test_expire_checkpoints_of_a_succeeded_job_at_once(
    database: Database, files: FileStore, in_days: Any, settled: None, tmp_path: Path
):
    claim = running(database)
    path, log = checkpoint(files, tmp_path, claim.job.id, 5), log_of(files, claim.job.id)
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, 1, step=5, sha256="5" * 64, bytes=5, path=path_of(claim.job.id, 5))
        lifecycle.finish_succeeded(connection, claim.job.id, 1, {}, [])
    assert in_days(0).removed == {"checkpoints": {"count": 1, "bytes": 5}}
    assert not path.parents[1].exists()
    assert log.exists()
    assert read_job(database, claim.job.id).checkpoint_step == 5


def test_expire_checkpoints_of_a_failed_job_after_a_week(
    database: Database, files: FileStore, in_days: Any, settled: None, tmp_path: Path
):
    recent, old = failed(database, days_ago=6.9), failed(database, days_ago=7.1)
    paths = [checkpoint(files, tmp_path, job.id, 5) for job in (recent, old)]
    assert in_days(0).removed == {"checkpoints": {"count": 1, "bytes": 5}}
    assert [path.exists() for path in paths] == [True, False]
    with database.begin() as connection:
        assert jobs.retry(connection, recent.id).checkpoint_step == 5
        assert jobs.retry(connection, old.id).checkpoint_step is None
        assert len(checkpoints.list_checkpoints(connection, recent.id)) == 1


def test_delete_expired_spares_a_job_that_was_queued_again(database: Database):
    job = failed(database, days_ago=8)
    with database.begin() as connection:
        assert checkpoints.list_expired(connection, 7 * DAY) == [job.id]
        jobs.retry(connection, job.id)
        checkpoints.delete_expired(connection, job.id, 7 * DAY)
        assert [row.step for row in checkpoints.list_checkpoints(connection, job.id)] == [5]


def test_tidy_checkpoints_deletes_files_that_no_row_can_name(
    database: Database, files: FileStore, in_days: Any, settled: None, tmp_path: Path
):
    job_id = running(database).job.id
    with database.begin() as connection:
        checkpoints.record(connection, job_id, 1, step=10, sha256="5" * 64, bytes=5, path=path_of(job_id, 10))
    expire_lease(database, job_id)
    claimed(database, takeover=True)
    named = checkpoint(files, tmp_path, job_id, 10)
    superseded, of_a_stale_attempt = checkpoint(files, tmp_path, job_id, 5), checkpoint(files, tmp_path, job_id, 15)
    without_a_row_yet, of_the_next = (
        checkpoint(files, tmp_path, job_id, 20, 2),
        checkpoint(files, tmp_path, job_id, 25, 3),
    )
    assert in_days(0).removed == {"checkpoints": {"count": 2, "bytes": 10}}
    exist = [path.exists() for path in (named, superseded, of_a_stale_attempt, without_a_row_yet, of_the_next)]
    assert exist == [True, False, False, True, True]


def test_tidy_checkpoints_after_a_release(
    database: Database, files: FileStore, in_days: Any, settled: None, tmp_path: Path
):
    job_id = running(database).job.id
    path = checkpoint(files, tmp_path, job_id, 5)
    in_days(0)
    assert path.exists()
    with database.begin() as connection:
        lifecycle.release(connection, job_id, 1, "drain")
    in_days(0)
    assert not path.parent.exists()
    assert path.parents[1].exists()


def test_tidy_checkpoints_spares_a_file_that_gets_its_row_meanwhile(
    database: Database, files: FileStore, in_days: Any, settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The attempt writes its row and releases the job just after its files were listed."""
    job_id = running(database).job.id
    path = checkpoint(files, tmp_path, job_id, 5)
    rows_of = Collector._rows_of

    def write_then_read(self: Collector, job_ids: list[str]) -> Any:
        with database.begin() as connection:
            checkpoints.record(connection, job_id, 1, step=5, sha256="5" * 64, bytes=5, path=path_of(job_id, 5))
            lifecycle.release(connection, job_id, 1, "drain")
        return rows_of(self, job_ids)

    monkeypatch.setattr(Collector, "_rows_of", write_then_read)
    in_days(0)
    assert path.exists()


def test_tidy_deletes_the_files_of_a_deleted_job(
    database: Database, files: FileStore, in_days: Any, settled: None, tmp_path: Path
):
    sha256 = put(files, "student")
    job = succeeded(database, sha256)
    path, log = checkpoint(files, tmp_path, job.id, 5), log_of(files, job.id)
    delete(database, job.id)
    assert in_days(0.9).removed == {}
    removed = in_days(1.1).removed
    assert removed["checkpoints"] == {"count": 1, "bytes": 5}
    assert removed["logs"] == {"count": 1, "bytes": 7}
    assert (path.parents[1].exists(), log.parent.exists(), place(files, sha256)) == (False, False, "trash")


def test_run_with_a_new_database_spares_unknown_files(
    database: Database, files: FileStore, in_days: Any, tmp_path: Path
):
    """It may be the wrong database: a wrong URL must not delete trainings."""
    job_id = new_id("job")
    path, log = checkpoint(files, tmp_path, job_id, 5), log_of(files, job_id)
    sha256 = put(files, "named elsewhere")
    assert list(in_days(30).removed) == ["to_trash"]
    assert path.exists() and log.exists()
    assert files.exists(sha256)


def test_run_spares_files_with_foreign_names(files: FileStore, in_days: Any, settled: None):
    foreign = ["logs/nginx/access.log", "checkpoints/mine/last.pt", "blobs/ab/notes.txt", "uploads/README", "trash/x"]
    for name in foreign:
        path = files.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("foreign")
        os.utime(path, (0, 0))
    assert in_days(30).removed == {}
    assert all((files.folder / name).exists() for name in foreign)


# ── uploads and temporaries ──


def upload(database: Database, files: FileStore, days_ago: float, content: bytes = b"part") -> uploads.Upload:
    with database.begin() as connection:
        begun = uploads.create(connection, "ours")
        created = update(tables.uploads).where(tables.uploads.c.id == begun.id)
        connection.execute(created.values(created_at=database_now() - days_ago * DAY))
    with uploads.open_part(files, begun) as file:
        file.write(content)
    with database.begin() as connection:
        return uploads.append(connection, "ours", begun.id, offset=0, length=len(content))


def rows_of_uploads(database: Database) -> set[str]:
    with database.connect() as connection:
        return set(connection.scalars(select(tables.uploads.c.id)))


def test_expire_uploads_that_are_open_a_day_after_the_last_byte(database: Database, files: FileStore, in_days: Any):
    begun_long_ago = upload(database, files, days_ago=30)
    begun_now = upload(database, files, days_ago=0)
    assert in_days(0.9).removed == {}
    assert in_days(1.1).removed == {"uploads": {"count": 1, "bytes": 4}}
    assert rows_of_uploads(database) == {begun_now.id}
    assert not files.upload_path(begun_long_ago.id).exists()


def test_expire_uploads_spares_one_that_is_being_written(database: Database, files: FileStore, in_days: Any):
    slow = upload(database, files, days_ago=30)
    with uploads.open_part(files, slow):
        assert in_days(30).removed == {}
    assert list(in_days(30).removed) == ["uploads"]


def test_delete_upload_spares_one_that_has_changed(database: Database, files: FileStore):
    before = upload(database, files, days_ago=30)
    with database.begin() as connection:
        changed = uploads.append(connection, "ours", before.id, offset=4, length=1)
        assert not uploads.delete_upload(connection, before)
        assert uploads.delete_upload(connection, changed)


def test_expire_uploads_deletes_a_complete_ones_row_and_frees_its_blob(
    database: Database, files: FileStore, in_days: Any
):
    completed = []
    for content in (b"named", b"not named"):
        sent = upload(database, files, days_ago=8, content=content)
        blob = uploads.adopt(files, sent)
        with database.begin() as connection:
            completed.append(uploads.complete(connection, "ours", sent.id, blob))
    name_by_dataset(database, str(completed[0].sha256))
    assert in_days(6.9).removed == {}
    assert set(in_days(7.1).removed) == {"uploads", "to_trash"}
    in_days(9)
    assert rows_of_uploads(database) == set()
    assert [place(files, str(one.sha256)) for one in completed] == ["blobs", "deleted"]


def test_tidy_uploads_deletes_a_file_without_a_row(database: Database, files: FileStore, in_days: Any, settled: None):
    open_one, orphan = upload(database, files, days_ago=0), files.upload_path(new_id("up"))
    orphan.write_bytes(b"not named")
    assert in_days(0.9).removed == {}
    assert in_days(1.1).removed == {"uploads": {"count": 1, "bytes": 9}}
    assert files.upload_path(open_one.id).exists()


def test_delete_temporaries_after_a_day(files: FileStore, in_days: Any):
    put(files, "makes the folder")
    (files.folder / "blobs" / ".0123.tmp").write_text("half")
    assert "temporaries" not in in_days(0.9).removed
    assert in_days(1.1).removed["temporaries"] == {"count": 1, "bytes": 4}


# ── all steps ──


def make_everything_to_collect(database: Database, files: FileStore, tmp_path: Path) -> None:
    job_id = failed(database, days_ago=8).id
    checkpoint(files, tmp_path, job_id, 5)
    checkpoint(files, tmp_path, running(database).job.id, 5, fence=0)
    log_of(files, new_id("job"))
    upload(database, files, days_ago=30)
    for number in range(3):
        put(files, f"not named {number}")
    (files.folder / "blobs" / ".0123.tmp").write_text("half")
    needed = put(files, "needed")
    name_by_model(database, needed)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_reports_what_a_run_removes_and_changes_nothing(
    database: Database, files: FileStore, in_days: Any, settled: None, tmp_path: Path
):
    make_everything_to_collect(database, files, tmp_path)
    before, rows = snapshot(files.folder), rows_of_uploads(database)
    reported: list[tuple[str, Path, int]] = []
    dry = in_days(8, dry_run=True, report=lambda *removal: reported.append(removal)).removed
    assert (snapshot(files.folder), rows_of_uploads(database)) == (before, rows)
    assert len(reported) == sum(tally["count"] for tally in dry.values())
    assert in_days(8).removed == dry
    assert set(dry) == {"checkpoints", "logs", "uploads", "to_trash", "temporaries"}


@pytest.mark.parametrize("point", ["collector.moved", "collector.removing", "collector.expired"])
@pytest.mark.parametrize("passing", [1, 2])
def test_run_that_dies_at_any_failpoint_is_finished_by_the_next(
    *,
    database: Database,
    files: FileStore,
    in_days: Any,
    settled: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    passing: int,
):
    monkeypatch.setattr(collector, "JOBS_PER_TRANSACTION", 1)
    make_everything_to_collect(database, files, tmp_path)
    failed(database, days_ago=8)
    failpoints.arm(f"{point}=away:{passing}")
    try:
        with pytest.raises(DatabaseUnavailable, match="a failpoint cut"):
            for _ in range(2):
                in_days(8)
    finally:
        failpoints.arm("")
    in_days(8)
    in_days(16)
    needed = hashlib.sha256(b"needed").hexdigest()
    assert set(snapshot(files.folder)) == {f"blobs/{needed[:2]}/{needed}"}


def test_run_continues_after_a_step_that_fails(files: FileStore, in_days: Any, monkeypatch: pytest.MonkeyPatch):
    sha256 = put(files, "not named")

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(uploads, "list_older_than", refused)
    assert in_days(2).faults == ["expire_uploads: [Errno 13] Permission denied"]
    assert place(files, sha256) == "trash"


def test_collect_writes_a_row_of_what_it_removed(database: Database, files: FileStore):
    put(files, "not named")
    immediately = Retention(after_s=0, checkpoints_s=0, uploads_s=0, open_uploads_s=0, inspections_s=0)
    assert collect(Collector(database, files, immediately), every_s=3600)
    assert not collect(Collector(database, files, immediately), every_s=3600)
    with database.connect() as connection:
        (row,) = collections.list_collections(connection)
    assert row.removed == {"to_trash": {"count": 1, "bytes": 9}}
    assert row.ended_at is not None and row.error is None


def test_collect_that_is_stopped_writes_so(database: Database, files: FileStore):
    sha256 = put(files, "not named")
    assert collect(Collector(database, files, RETENTION, stopped=lambda: True), every_s=0)
    with database.connect() as connection:
        assert collections.list_collections(connection)[0].error == "stopped before the end"
    assert place(files, sha256) == "blobs"


def test_collect_runs_without_a_row_if_the_disk_is_full(
    database: Database, files: FileStore, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise StorageFull("the database has no disk space to write", "free some disk space, then try again")

    monkeypatch.setattr(collections, "begin", full)
    sha256 = put(files, "not named")
    immediately = Retention(after_s=0, checkpoints_s=0, uploads_s=0, open_uploads_s=0, inspections_s=0)
    for _ in range(2):
        assert collect(Collector(database, files, immediately), every_s=0)
    assert place(files, sha256) == "deleted"


def test_collector_does_not_keep_the_file_of_a_refused_registration(database: Database, files: FileStore, in_days):
    sha256 = put(files, "junk")
    with database.begin() as connection:
        entry = registry.models.register(connection, NewEntry("ours", "junk", sha256, {}, {}), "server", 30.0)
        registry.models.refuse(connection, entry, "server", {"message": "not a checkpoint"})
    assert list(in_days(1.1).removed) == ["to_trash"]


def test_expire_inspections_keeps_those_that_are_used(database: Database, files: FileStore):
    month = 30 * DAY
    with database.begin() as connection:
        for key in ("used", "unused", "new"):
            registry.put_inspection(connection, "0" * 64, "model", key, {"refused": {}})
        aged = update(tables.inspections).where(tables.inspections.c.key != "new")
        connection.execute(aged.values(seen_at=tables.inspections.c.seen_at - month - 60))
        assert registry.is_long_unused(connection, "0" * 64, "model", "used", DAY)
        assert not registry.is_long_unused(connection, "0" * 64, "model", "new", DAY)
        assert not registry.is_long_unused(connection, "0" * 64, "model", "none", DAY)
        registry.note_use(connection, "0" * 64, "model", "used")
    dry = Collector(database, files, RETENTION, dry_run=True)
    dry.expire_inspections()
    collector = Collector(database, files, RETENTION)
    collector.expire_inspections()
    assert collector.removed == dry.removed == {"inspections": {"count": 1, "bytes": 0}}
    with database.connect() as connection:
        assert set(connection.scalars(select(tables.inspections.c.key))) == {"used", "new"}


def test_expire_uploads_deletes_one_without_a_byte_after_an_hour(database: Database, files: FileStore, in_days: Any):
    with database.begin() as connection:
        empty = [uploads.create(connection, "ours", bytes=10) for _ in range(2)]
        created = update(tables.uploads).where(tables.uploads.c.id == empty[0].id)
        connection.execute(created.values(created_at=database_now() - 3700))
    assert in_days(0).removed == {"uploads": {"count": 1, "bytes": 0}}
    assert rows_of_uploads(database) == {empty[1].id}


def test_free_blob_deletes_only_what_no_row_names_or_may_name(database: Database, files: FileStore):
    sha256 = put(files, "content")
    sending = upload(database, files, days_ago=0)
    assert not free_blob(database, files, "ours", sha256), (
        "an upload has all its bytes, and its digest is not known yet"
    )
    assert files.trash_path(sha256).exists(), "the collector deletes it later"
    with database.begin() as connection:
        blob = uploads.adopt(files, sending)
        uploads.complete(connection, "ours", sending.id, blob)
    assert free_blob(database, files, "ours", sha256) and not files.exists(sha256)
    assert not free_blob(database, files, "ours", blob.sha256) and files.exists(blob.sha256)


def test_collector_deletes_old_entries_of_the_audit_log_and_free_keys(database: Database, files: FileStore):
    nobody = audit.Actor("ours", None, "ann", "member", None, None)
    with database.begin() as connection:
        audit.append(connection, nobody, "job.submit", "job_1")
        connection.execute(update(tables.audit).values(at=tables.audit.c.at - 100))
        audit.append(connection, nobody, "job.cancel", "job_1")
    submitted(database, idempotency_key="kept")
    gone = submitted(database, idempotency_key="gone")
    with database.begin() as connection:
        jobs.cancel(connection, gone.id)
        jobs.delete(connection, gone.id)
    for dry_run, entries, keys in ((True, 2, 2), (False, 1, 1)):
        Collector(database, files, Retention(9, 9, 9, 9, audit_s=60), dry_run=dry_run).expire_rows()
        with database.connect() as connection:
            assert len(connection.execute(select(tables.audit)).all()) == entries
            assert len(connection.execute(select(tables.idempotency)).all()) == keys
