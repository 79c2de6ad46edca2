"""What goes, when, and above all what stays. Time passes by telling the file store a later hour."""

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
from store import checkpoints, collections, collector, datasets, jobs, lifecycle, models, tables, uploads
from store.artifacts import NewArtifact
from store.blobs import BlobStore
from store.clock import database_now
from store.collector import Collector, Retention, collect, named_digests
from store.database import Database
from store.ids import new_id
from store.rows import Job
from tests.store.scene import ERROR, claimed, lapse, now, running, submitted

DAY = 86_400.0
RETENTION = Retention(after_s=DAY, checkpoints_s=7 * DAY, uploads_s=7 * DAY)


@pytest.fixture
def files(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "files")


@pytest.fixture
def in_days(files: BlobStore, database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Collector]:
    """A collection, so many days from now by the clock of the files."""
    monkeypatch.setattr(collector, "PAUSE_S", 0)

    def run(days: float, **options: Any) -> Collector:
        monkeypatch.setattr(files, "now", lambda: time.time() + days * DAY)
        collecting = Collector(database, files, RETENTION, **options)
        collecting.run()
        return collecting

    return run


@pytest.fixture
def settled(database: Database) -> None:
    """A database that has collected for longer than a day."""
    with database.begin() as connection:
        row = {"id": new_id("col"), "host": "here", "began_at": database_now() - 2 * DAY}
        connection.execute(insert(tables.collections).values(**row))


def put(files: BlobStore, content: str) -> str:
    return files.put_stream([content.encode()]).sha256


def lies(files: BlobStore, sha256: str) -> str:
    """Where a blob is; looked up from outside, since to ask for it would bring it back."""
    places = {"place": files.folder / "blobs" / sha256[:2] / sha256, "trash": files.folder / "trash" / sha256}
    found = [name for name, path in places.items() if path.exists()]
    return " and ".join(found) or "gone"


def succeeded(database: Database, sha256: str) -> Job:
    claim = running(database)
    made = [NewArtifact("student.safetensors", sha256, 1, "application/octet-stream")]
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, made)
    return now(database, claim.job.id)


def failed(database: Database, days_ago: float) -> Job:
    claim = running(database)
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, 1, step=5, sha256="5" * 64, bytes=1, path=path_of(claim.job.id, 5))
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, None)
        ended = update(tables.jobs).where(tables.jobs.c.id == claim.job.id)
        connection.execute(ended.values(finished_at=database_now() - days_ago * DAY))
    return now(database, claim.job.id)


def path_of(job_id: str, step: int, fence: int = 1) -> str:
    return f"checkpoints/{job_id}/{fence}/{step:09d}.pt"


def checkpoint(files: BlobStore, tmp_path: Path, job_id: str, step: int, fence: int = 1) -> Path:
    source = tmp_path / "state.pt"
    source.write_bytes(b"state")
    files.put_checkpoint(job_id, fence, step, source)
    return files.checkpoint_path(job_id, fence, step)


def log_of(files: BlobStore, job_id: str) -> Path:
    path = files.log_path(job_id, 1)
    path.parent.mkdir(parents=True)
    path.write_text("epoch 1")
    return path


def delete(database: Database, job_id: str) -> None:
    with database.begin() as connection:
        jobs.delete(connection, job_id)


# ── blobs ──


def test_a_blob_that_nobody_names_lies_a_day_in_its_place_and_a_day_in_the_trash(files: BlobStore, in_days: Any):
    sha256 = put(files, "of nobody")
    assert in_days(0.9).removed == {}
    assert in_days(1.1).removed == {"to_trash": {"count": 1, "bytes": 9}}
    assert lies(files, sha256) == "trash"
    assert in_days(0.9).removed == {}
    assert in_days(1.1).removed == {"blobs": {"count": 1, "bytes": 9}}
    assert lies(files, sha256) == "gone"


def test_the_time_in_the_trash_counts_from_the_move(files: BlobStore, in_days: Any):
    """However old its bytes are: somebody may have been told a moment ago that they are there."""
    sha256 = put(files, "years old")
    os.utime(files.folder / "blobs" / sha256[:2] / sha256, (0, 0))
    assert list(in_days(0).removed) == ["to_trash"]
    assert in_days(0.9).removed == {}
    assert list(in_days(1.1).removed) == ["blobs"]


def by_an_artifact(database: Database, sha256: str) -> None:
    succeeded(database, sha256)


def by_a_model(database: Database, sha256: str) -> None:
    with database.begin() as connection:
        models.register(connection, "ours", "resnet", sha256, {})


def by_a_data_set(database: Database, sha256: str) -> None:
    with database.begin() as connection:
        datasets.register(connection, "ours", "flowers", sha256, {})


def by_an_upload(database: Database, sha256: str) -> None:
    with database.begin() as connection:
        uploads.create(connection, "ours", sha256=sha256)


def by_a_job(database: Database, sha256: str) -> None:
    teachers = [{"checkpoint": "weights:resnet50"}, {"program": f"blob:sha256:{sha256}"}]
    submitted(database, resolved={"method": {"name": "kd"}, "teacher": teachers})


def by_the_last_of_many_jobs(database: Database, sha256: str) -> None:
    for _ in range(4):
        submitted(database, resolved={"dataset": {"source": f"blob:sha256:{'0' * 64}"}})
    submitted(database, resolved={"dataset": {"source": f"blob:sha256:{sha256}"}})


NAMERS = [by_an_artifact, by_a_model, by_a_data_set, by_an_upload, by_a_job, by_the_last_of_many_jobs]


@pytest.mark.parametrize("named", NAMERS)
def test_what_a_row_names_stays(
    database: Database, files: BlobStore, in_days: Any, named: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collector, "BATCH", 2)
    sha256, other = put(files, "named"), put(files, "of nobody")
    named(database, sha256)
    in_days(30)
    in_days(60)
    assert (lies(files, sha256), lies(files, other)) == ("place", "gone")


def test_what_was_inspected_is_no_more_needed_than_what_was_not(database: Database, files: BlobStore, in_days: Any):
    sha256 = put(files, "looked at once")
    with database.begin() as connection:
        seen = {"digest": sha256, "kind": "model", "key": "", "facts": {}}
        connection.execute(insert(tables.inspections).values(**seen, seen_at=database_now()))
    in_days(2)
    assert lies(files, sha256) == "trash"


@pytest.mark.parametrize("named", NAMERS)
def test_what_a_row_names_later_comes_back(database: Database, files: BlobStore, in_days: Any, named: Any):
    sha256 = put(files, "named late")
    in_days(2)
    named(database, sha256)
    assert lies(files, sha256) == "trash"
    assert in_days(2).removed == {"brought_back": {"count": 1, "bytes": 10}}
    assert lies(files, sha256) == "place"


def test_what_a_row_names_at_the_moment_of_the_move_is_not_left_in_the_trash(
    database: Database, files: BlobStore, in_days: Any, monkeypatch: pytest.MonkeyPatch
):
    sha256 = put(files, "just in time")
    throw_away = files.throw_away

    def commit_meanwhile(*given: Any) -> bool:
        thrown = throw_away(*given)
        by_a_model(database, sha256)
        return thrown

    monkeypatch.setattr(files, "throw_away", commit_meanwhile)
    removed = in_days(2).removed
    assert removed["brought_back"] == {"count": 1, "bytes": 12}
    assert lies(files, sha256) == "place"


def test_who_asks_has_it_for_another_day(files: BlobStore, in_days: Any):
    """A request that was told that the bytes are there has a day to name them."""
    sha256 = put(files, "asked for")
    os.utime(files.path(sha256), (0, 0))
    assert files.exists(sha256)
    assert in_days(0.9).removed == {}
    os.utime(files.folder / "blobs" / sha256[:2] / sha256, (0, 0))
    assert list(in_days(0.9).removed) == ["to_trash"]


def test_a_name_on_its_way_from_one_row_to_another_is_not_missed(database: Database, monkeypatch: pytest.MonkeyPatch):
    """Registered from a job that is deleted then: read one after the other, neither row would show the name."""
    sha256 = "d" * 64
    job = succeeded(database, "0" * 64)
    with database.begin() as connection:
        spec = {"teacher": {"checkpoint": f"blob:sha256:{sha256}"}}
        connection.execute(update(tables.jobs).values(resolved_spec=spec))
    named = collector._named
    moved = []

    def move_in_between(connection: Any) -> Iterator[Any]:
        for number, digests in enumerate(named(connection)):
            yield digests
            if number == 3:
                by_a_model(database, sha256)
                delete(database, job.id)
                moved.append(sha256)

    monkeypatch.setattr(collector, "_named", move_in_between)
    assert sha256 in named_digests(database)
    assert moved


def test_a_copy_in_the_trash_goes_when_its_place_was_filled_again(
    database: Database, files: BlobStore, in_days: Any, monkeypatch: pytest.MonkeyPatch
):
    sha256 = put(files, "twice")
    in_days(2)
    monkeypatch.undo()
    put(files, "twice")
    by_a_model(database, sha256)
    assert lies(files, sha256) == "place and trash"
    in_days(2)
    assert lies(files, sha256) == "place"


# ── what belongs to jobs ──


def test_a_succeeded_jobs_checkpoints_go_at_once(
    database: Database, files: BlobStore, in_days: Any, settled: None, tmp_path: Path
):
    claim = running(database)
    path, log = checkpoint(files, tmp_path, claim.job.id, 5), log_of(files, claim.job.id)
    with database.begin() as connection:
        checkpoints.record(connection, claim.job.id, 1, step=5, sha256="5" * 64, bytes=5, path=path_of(claim.job.id, 5))
        lifecycle.finish_succeeded(connection, claim.job.id, 1, {}, [])
    assert in_days(0).removed == {"checkpoints": {"count": 1, "bytes": 5}}
    assert not path.parents[1].exists()
    assert log.exists()
    assert now(database, claim.job.id).checkpoint_step == 5


def test_a_failed_jobs_checkpoints_are_kept_for_a_week(
    database: Database, files: BlobStore, in_days: Any, settled: None, tmp_path: Path
):
    young, old = failed(database, days_ago=6.9), failed(database, days_ago=7.1)
    paths = [checkpoint(files, tmp_path, job.id, 5) for job in (young, old)]
    assert in_days(0).removed == {"checkpoints": {"count": 1, "bytes": 5}}
    assert [path.exists() for path in paths] == [True, False]
    with database.begin() as connection:
        assert jobs.retry(connection, young.id).checkpoint_step == 5
        assert jobs.retry(connection, old.id).checkpoint_step is None
        assert len(checkpoints.newest(connection, young.id)) == 1


def test_a_job_that_was_queued_again_meanwhile_keeps_its_checkpoints(database: Database):
    job = failed(database, days_ago=8)
    with database.begin() as connection:
        assert checkpoints.expired(connection, 7 * DAY) == [job.id]
        jobs.retry(connection, job.id)
        checkpoints.expire(connection, job.id, 7 * DAY)
        assert [kept.step for kept in checkpoints.newest(connection, job.id)] == [5]


def test_files_that_no_row_can_name_any_more_go_and_those_of_the_living_stay(
    database: Database, files: BlobStore, in_days: Any, settled: None, tmp_path: Path
):
    job_id = running(database).job.id
    with database.begin() as connection:
        checkpoints.record(connection, job_id, 1, step=10, sha256="5" * 64, bytes=5, path=path_of(job_id, 10))
    lapse(database, job_id)
    claimed(database, rescue=True)
    named = checkpoint(files, tmp_path, job_id, 10)
    superseded, of_a_zombie = checkpoint(files, tmp_path, job_id, 5), checkpoint(files, tmp_path, job_id, 15)
    on_its_way, of_the_next = checkpoint(files, tmp_path, job_id, 20, 2), checkpoint(files, tmp_path, job_id, 25, 3)
    assert in_days(0).removed == {"checkpoints": {"count": 2, "bytes": 10}}
    seen = [path.exists() for path in (named, superseded, of_a_zombie, on_its_way, of_the_next)]
    assert seen == [True, False, False, True, True]


def test_files_of_a_released_attempt_that_got_no_row_go(
    database: Database, files: BlobStore, in_days: Any, settled: None, tmp_path: Path
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


def test_a_row_written_while_the_collector_looks_keeps_its_file(
    database: Database, files: BlobStore, in_days: Any, settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The attempt writes its row and hands the job back, right after its files were listed."""
    job_id = running(database).job.id
    path = checkpoint(files, tmp_path, job_id, 5)
    rows_of = Collector._rows_of

    def late(self: Collector, job_ids: list[str]) -> Any:
        with database.begin() as connection:
            checkpoints.record(connection, job_id, 1, step=5, sha256="5" * 64, bytes=5, path=path_of(job_id, 5))
            lifecycle.release(connection, job_id, 1, "drain")
        return rows_of(self, job_ids)

    monkeypatch.setattr(Collector, "_rows_of", late)
    in_days(0)
    assert path.exists()


def test_what_a_deletion_left_when_it_was_killed_goes(
    database: Database, files: BlobStore, in_days: Any, settled: None, tmp_path: Path
):
    sha256 = put(files, "student")
    job = succeeded(database, sha256)
    path, log = checkpoint(files, tmp_path, job.id, 5), log_of(files, job.id)
    delete(database, job.id)
    assert in_days(0.9).removed == {}
    removed = in_days(1.1).removed
    assert removed["checkpoints"] == {"count": 1, "bytes": 5}
    assert removed["logs"] == {"count": 1, "bytes": 7}
    assert (path.parents[1].exists(), log.parent.exists(), lies(files, sha256)) == (False, False, "trash")


def test_a_database_that_is_new_to_the_files_spares_what_it_does_not_know(
    database: Database, files: BlobStore, in_days: Any, tmp_path: Path
):
    """It may be the wrong one: a mistake in its address must not cost a night's work."""
    job_id = new_id("job")
    path, log = checkpoint(files, tmp_path, job_id, 5), log_of(files, job_id)
    sha256 = put(files, "known to another")
    assert list(in_days(30).removed) == ["to_trash"]
    assert path.exists() and log.exists()
    assert files.exists(sha256)


def test_what_has_none_of_our_names_is_not_ours(files: BlobStore, in_days: Any, settled: None):
    foreign = ["logs/nginx/access.log", "checkpoints/mine/last.pt", "blobs/ab/notes.txt", "uploads/README", "trash/x"]
    for name in foreign:
        path = files.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("foreign")
        os.utime(path, (0, 0))
    assert in_days(30).removed == {}
    assert all((files.folder / name).exists() for name in foreign)


# ── uploads and leftovers ──


def upload(database: Database, files: BlobStore, days_ago: float, content: bytes = b"part") -> uploads.Upload:
    with database.begin() as connection:
        begun = uploads.create(connection, "ours")
        created = update(tables.uploads).where(tables.uploads.c.id == begun.id)
        connection.execute(created.values(created_at=database_now() - days_ago * DAY))
    with uploads.part(files, begun) as file:
        file.write(content)
    with database.begin() as connection:
        return uploads.append(connection, "ours", begun.id, offset=0, length=len(content))


def rows_of_uploads(database: Database) -> set[str]:
    with database.connect() as connection:
        return set(connection.scalars(select(tables.uploads.c.id)))


def test_an_open_upload_goes_a_week_after_its_last_byte(database: Database, files: BlobStore, in_days: Any):
    begun_long_ago = upload(database, files, days_ago=30)
    begun_now = upload(database, files, days_ago=0)
    assert in_days(6.9).removed == {}
    assert in_days(7.1).removed == {"uploads": {"count": 1, "bytes": 4}}
    assert rows_of_uploads(database) == {begun_now.id}
    assert not files.upload_path(begun_long_ago.id).exists()


def test_an_upload_that_somebody_writes_to_is_let_be(database: Database, files: BlobStore, in_days: Any):
    slow = upload(database, files, days_ago=30)
    with uploads.part(files, slow):
        assert in_days(30).removed == {}
    assert list(in_days(30).removed) == ["uploads"]


def test_an_upload_that_went_on_since_it_was_looked_at_is_let_be(database: Database, files: BlobStore):
    seen = upload(database, files, days_ago=30)
    with database.begin() as connection:
        gone_on = uploads.append(connection, "ours", seen.id, offset=4, length=1)
        assert not uploads.forget(connection, seen)
        assert uploads.forget(connection, gone_on)


def test_a_complete_uploads_row_goes_and_then_its_blob_unless_somebody_else_names_it(
    database: Database, files: BlobStore, in_days: Any
):
    done = []
    for content in (b"kept", b"forgotten"):
        sent = upload(database, files, days_ago=8, content=content)
        blob = uploads.adopt(files, sent)
        with database.begin() as connection:
            done.append(uploads.complete(connection, "ours", sent.id, blob))
    by_a_data_set(database, str(done[0].sha256))
    assert in_days(6.9).removed == {}
    assert set(in_days(7.1).removed) == {"uploads", "to_trash"}
    in_days(9)
    assert rows_of_uploads(database) == set()
    assert [lies(files, str(one.sha256)) for one in done] == ["place", "gone"]


def test_a_file_without_an_upload_goes(database: Database, files: BlobStore, in_days: Any, settled: None):
    open_one, orphan = upload(database, files, days_ago=0), files.upload_path(new_id("up"))
    orphan.write_bytes(b"of nobody")
    assert in_days(0.9).removed == {}
    assert in_days(1.1).removed == {"uploads": {"count": 1, "bytes": 9}}
    assert files.upload_path(open_one.id).exists()


def test_what_a_killed_process_left_half_written_goes_after_a_day(files: BlobStore, in_days: Any):
    put(files, "makes the folder")
    (files.folder / "blobs" / ".0123.tmp").write_text("half")
    assert "temporaries" not in in_days(0.9).removed
    assert in_days(1.1).removed["temporaries"] == {"count": 1, "bytes": 4}


# ── all of it ──


def everything_that_can_go(database: Database, files: BlobStore, tmp_path: Path) -> None:
    job_id = failed(database, days_ago=8).id
    checkpoint(files, tmp_path, job_id, 5)
    checkpoint(files, tmp_path, running(database).job.id, 5, fence=0)
    log_of(files, new_id("job"))
    upload(database, files, days_ago=30)
    for number in range(3):
        put(files, f"of nobody {number}")
    (files.folder / "blobs" / ".0123.tmp").write_text("half")
    needed = put(files, "needed")
    by_a_model(database, needed)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_rehearsal_tells_what_the_performance_does_and_touches_nothing(
    database: Database, files: BlobStore, in_days: Any, settled: None, tmp_path: Path
):
    everything_that_can_go(database, files, tmp_path)
    before, rows = snapshot(files.folder), rows_of_uploads(database)
    told: list[tuple[str, Path, int]] = []
    rehearsed = in_days(8, dry_run=True, tell=lambda *said: told.append(said)).removed
    assert (snapshot(files.folder), rows_of_uploads(database)) == (before, rows)
    assert len(told) == sum(went["count"] for went in rehearsed.values())
    assert in_days(8).removed == rehearsed
    assert set(rehearsed) == {"checkpoints", "logs", "uploads", "to_trash", "temporaries"}


@pytest.mark.parametrize("point", ["collector.moved", "collector.removing", "collector.expired"])
@pytest.mark.parametrize("passing", [1, 2])
def test_a_collector_that_dies_anywhere_leaves_what_the_next_can_finish(
    *,
    database: Database,
    files: BlobStore,
    in_days: Any,
    settled: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    passing: int,
):
    monkeypatch.setattr(collector, "FEW", 1)
    everything_that_can_go(database, files, tmp_path)
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


def test_a_step_that_fails_is_told_and_holds_up_no_other(
    files: BlobStore, in_days: Any, monkeypatch: pytest.MonkeyPatch
):
    sha256 = put(files, "of nobody")

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(uploads, "older_than", refused)
    assert in_days(2).faults == ["expire_uploads: [Errno 13] Permission denied"]
    assert lies(files, sha256) == "trash"


def test_each_collection_keeps_a_row_of_what_it_removed(database: Database, files: BlobStore):
    put(files, "of nobody")
    at_once = Retention(after_s=0, checkpoints_s=0, uploads_s=0)
    assert collect(Collector(database, files, at_once), every_s=3600)
    assert not collect(Collector(database, files, at_once), every_s=3600)
    with database.connect() as connection:
        (row,) = collections.list(connection)
    assert row.removed == {"to_trash": {"count": 1, "bytes": 9}}
    assert row.ended_at is not None and row.error is None


def test_one_that_was_stopped_says_so(database: Database, files: BlobStore):
    sha256 = put(files, "of nobody")
    assert collect(Collector(database, files, RETENTION, stopped=lambda: True), every_s=0)
    with database.connect() as connection:
        assert collections.list(connection)[0].error == "stopped before the end"
    assert lies(files, sha256) == "place"


def test_a_database_without_room_for_the_row_does_not_keep_the_collector_from_making_room(
    database: Database, files: BlobStore, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise StorageFull("the database has no room to write", "free some space, then try again")

    monkeypatch.setattr(collections, "begin", full)
    sha256 = put(files, "of nobody")
    at_once = Retention(after_s=0, checkpoints_s=0, uploads_s=0)
    for _ in range(2):
        assert collect(Collector(database, files, at_once), every_s=0)
    assert lies(files, sha256) == "gone"
