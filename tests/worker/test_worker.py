"""A worker that has to leave does so in time, at any point of its work, and leaves nothing behind."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from base.errors import DatabaseUnavailable
from store.file_store import FileStore
from store.settings import Settings
from tests.worker.conftest import CPU
from tests.worker.job_database import OPTIONS, JobDatabase, engines, waiting_engines
from tests.worker.processes import until
from worker import attempt, periodic
from worker import worker as worker_module
from worker.periodic import Collection, Sweep
from worker.worker import Worker

Start = Callable[..., Worker]


def assert_leaves(worker: Worker, db: JobDatabase) -> None:
    """It leaves in time, and no folder and no engine is left."""
    assert worker.stop()
    db.assert_nothing_left()
    # The worker has seen the end of the guard; a killed engine may take a moment longer.
    until(lambda: not waiting_engines(db.settings.home), "the engines that waited to end")


def when(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, then: Callable[[], None]) -> None:
    """Call `then` before each call of this function."""
    before = getattr(place, name)

    def first_then(*arguments: Any, **named: Any) -> Any:
        then()
        return before(*arguments, **named)

    monkeypatch.setattr(place, name, first_then)


def test_worker_stop_ends_the_engines_that_wait(settings: Settings, db: JobDatabase, start_worker: Start):
    worker = start_worker(slots=2)
    until(lambda: len(waiting_engines(settings.home)) == 4, "an engine for each slot, and its guard")
    assert_leaves(worker, db)


def test_worker_stop_without_a_database(settings: Settings, tmp_path: Path):
    nowhere = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/no/such/folder/rows.db"})
    worker = Worker(nowhere, OPTIONS, listens=False, devices=[CPU])
    worker.start()
    assert not worker.has_polled
    assert worker.stop()


def test_worker_drain_requeues_a_job_that_is_being_prepared(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    """The request to leave comes while an input is checked."""
    blob = db.files.put_stream([b"a teacher"])
    worker = start_worker()
    when(monkeypatch, attempt, "sha256_of", worker.drain)
    job_id = db.submit(steps=2, teacher=f"blob:sha256:{blob.sha256}")
    until(lambda: "released" in db.types(job_id), "the job to be requeued")
    assert_leaves(worker, db)
    assert (db.job(job_id).status, db.job(job_id).attempts_without_progress) == ("queued", 0)
    assert "phase" not in db.types(job_id), "no engine got the order"


def test_worker_drain_lets_a_job_finish_that_is_being_published(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    worker = start_worker()
    when(monkeypatch, FileStore, "put_file", worker.drain)
    job_id = db.submit(steps=2, checkpoint_every=100)
    db.assert_trained(job_id, 2)
    assert_leaves(worker, db)


def test_worker_drain_requeues_a_job_whose_engine_begins(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    """The request to leave comes between the order and the engine's first line."""
    worker = start_worker()
    when(monkeypatch, attempt, "EngineRun", worker.drain)
    job_id = db.submit(steps=100_000)
    until(lambda: db.job(job_id).status == "queued" and db.job(job_id).fence, "the job to be requeued")
    assert_leaves(worker, db)
    assert db.job(job_id).attempts_without_progress == 0


def test_worker_stop_leaves_its_job_to_the_lease_when_the_database_is_away(
    db: JobDatabase, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    job_id = db.submit(steps=100_000)
    worker = start_worker()
    db.until_checkpoint(job_id)

    def away() -> None:
        raise DatabaseUnavailable("gone for this test")

    monkeypatch.setattr(worker.context.database, "begin", away)
    assert_leaves(worker, db)
    assert (db.job(job_id).status, db.job(job_id).fence) == ("running", 1)
    assert not engines(db.settings.home)


def test_worker_stop_leaves_a_database_that_hangs(
    start_worker: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A frozen server answers neither the sweep, nor the collection, nor the sign-off."""
    hanging, thawed = [], threading.Event()

    def hang(*_: Any) -> None:
        hanging.append(None)
        thawed.wait()

    monkeypatch.setattr(worker_module, "LEAVES_IN_S", 0.1)
    monkeypatch.setattr(periodic, "FIRST_CHECK_S", 0)
    for place, name in ((Sweep, "sweep"), (Collection, "collect"), (worker_module, "sign_off")):
        monkeypatch.setattr(place, name, hang)
    worker = start_worker()
    until(lambda: worker.has_polled and len(hanging) == 2, "the sweep and the collection to hang")
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    try:
        until(lambda: not stopping.is_alive(), "the worker to leave")
    finally:
        thawed.set()
        stopping.join()
    assert [name for name in ("sweep", "collection", "sign-off") if f"the {name} hangs" in caplog.text] == [
        "sweep",
        "collection",
        "sign-off",
    ]
