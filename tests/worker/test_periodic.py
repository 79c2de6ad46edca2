"""Periodic tasks go on after a failure and end when they are stopped; the collection runs in one worker of all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from base.errors import DatabaseUnavailable
from store import collections, lifecycle, tables
from store.collections import Collection as Row
from store.records import database_now
from store.settings import Settings
from tests.store.helpers import run_concurrently
from tests.worker.job_database import OPTIONS, JobDatabase, engines, worker_process
from tests.worker.processes import until
from worker.context import WorkerContext
from worker.periodic import Collection, PeriodicTask, Sweep, summary
from worker.worker import Worker


class Counting(PeriodicTask):
    done = 0

    def run(self) -> None:
        self.done += 1
        if self.done == 2:
            raise RuntimeError("the second run fails")


def test_periodic_task_runs_again_after_a_failure_until_it_is_stopped():
    task = Counting("counting", every_s=0.01)
    task.start()
    until(lambda: task.done > 3, "runs after the one that failed")
    assert task.stop(timeout_s=30)
    done = task.done
    assert task.stop() and task.done == done


def test_periodic_task_stop_without_start():
    assert Counting("counting", every_s=1, first_s=600).stop()


def test_sweep_that_lost_the_database_requeues_the_dead_workers_job_the_next_time(
    context: WorkerContext, db: JobDatabase, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The folder is the only proof on this host that the worker is dead: without it, the job waits for its lease."""
    job_id = db.submit(steps=10, checkpoint_every=2, at={"3": "loiter"})
    with worker_process(settings, tmp_path / "log") as worker:
        db.until_checkpoint(job_id)
        worker.kill()
        worker.wait()
    until(lambda: not engines(settings.home), "the engine to end with its worker")
    sweep = Sweep(context, [])

    def unreachable(*_: Any, **__: Any) -> bool:
        raise DatabaseUnavailable("the server is starting again")

    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "finish_failed", unreachable)
        with pytest.raises(DatabaseUnavailable):
            sweep.requeue_dead()
    assert db.job(job_id).status == "running"
    sweep.requeue_dead()
    assert db.job(job_id).status == "queued"
    db.assert_nothing_left()


DAY = 86_400.0


@pytest.fixture
def often(settings: Settings) -> Settings:
    return settings.model_copy(update={"collect_every_s": 0.2})


def rows(db: JobDatabase) -> list[Row]:
    with db.database.connect() as connection:
        return list(collections.list_collections(connection))


def collected_before(db: JobDatabase) -> None:
    """The row of a collection two days ago."""
    with db.database.begin() as connection:
        row = {"id": "col_first", "host": "here", "began_at": database_now() - 2 * DAY}
        connection.execute(insert(tables.collections).values(**row))


def old_blob(db: JobDatabase) -> Path:
    sha256 = db.files.put_stream([b"unused"]).sha256
    path = db.files.path(sha256)
    os.utime(path, (0, 0))
    return path


def old_entry(context: WorkerContext, name: str) -> Path:
    folder = context.cache / name
    folder.mkdir(parents=True)
    (folder / "train_pixels.npy").write_bytes(b"1234")
    os.utime(folder, (0, 0))
    return folder


def test_collection_survives_a_cache_that_cannot_be_trimmed(
    context: WorkerContext, db: JobDatabase, caplog: pytest.LogCaptureFixture
):
    old_entry(context, "half.partial")
    context.cache.joinpath("half.lock").mkdir()
    collected_before(db)
    blob = old_blob(db)
    assert Collection(context).collect()["to_trash"]["count"] == 1
    assert not blob.exists()
    assert "the cache could not be trimmed" in caplog.text


def test_collection_runs_in_a_worker_after_its_jobs(
    db: JobDatabase, often: Settings, start_worker: Callable[..., Worker]
):
    collected_before(db)
    start_worker(often)
    job_id = db.submit(steps=10)
    db.assert_trained(job_id, 10)
    folder = db.files.folder / "checkpoints" / job_id
    until(lambda: not folder.exists(), "the checkpoints of the succeeded job to go")
    until(lambda: any("checkpoints" in (row.removed or {}) for row in rows(db)), "a row that shows it")
    assert {row.error for row in rows(db)} == {None}
    db.assert_trained(job_id, 10)


def test_collection_that_lost_the_database_is_repeated(
    db: JobDatabase, often: Settings, start_worker: Callable[..., Worker], arm: Callable[[str], None]
):
    path = old_blob(db)
    arm("collector.moved=away")
    start_worker(often)
    until(lambda: not path.exists(), "the blob to go to the trash")
    until(lambda: len([row for row in rows(db) if row.error is None and row.ended_at]) > 1, "the next collections")


def test_collection_runs_in_one_of_many_workers_and_each_trims_its_own_cache(context: WorkerContext, db: JobDatabase):
    path, entry = old_blob(db), old_entry(context, "set-native-v1")
    small = context.settings.model_copy(update={"cache_max_bytes": 0})
    others = [
        WorkerContext(small.model_copy(update={"home": small.home / f"host{number}"}), OPTIONS, print)
        for number in (1, 2)
    ]
    entries = [old_entry(other, "set-native-v1") for other in others]
    try:
        removed = run_concurrently([Collection(each).collect for each in (context, *others)])
    finally:
        for other in others:
            other.close()
    assert not any(isinstance(one, Exception) for one in removed), removed
    assert len(rows(db)) == 1
    assert not path.exists()
    assert sum("to_trash" in one for one in removed if isinstance(one, dict)) == 1
    assert entry.exists() and not any(each.exists() for each in entries)


def test_collection_does_nothing_before_it_is_due_again(context: WorkerContext, db: JobDatabase):
    assert Collection(context).collect() == {}
    path = old_blob(db)
    assert Collection(context).collect() == {}
    assert path.exists()
    assert len(rows(db)) == 1


def test_collection_that_is_stopped_leaves_the_rest_to_the_next(
    context: WorkerContext, db: JobDatabase, often: Settings
):
    path, collection = old_blob(db), Collection(context)
    collection.stop()
    collection.collect()
    assert path.exists()
    assert [row.error for row in rows(db)] == ["stopped before the end"]


def test_summary_is_one_line():
    removed = {"blobs": {"count": 2, "bytes": 1_300_000}, "logs": {"count": 1, "bytes": 10}}
    assert summary(removed) == "2 blobs (1.3 MB), 1 logs (0.0 MB)"
