"""Told to leave, a worker does so in time, whatever it is at, and leaves nothing behind."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from base.errors import DatabaseUnavailable
from store.blobs import BlobStore
from store.settings import Settings
from tests.worker.conftest import CPU
from tests.worker.processes import until
from tests.worker.table import OPTIONS, Table, engines, waiting_engines
from worker import collection, run_job, service, supervision
from worker.collection import Collection
from worker.service import Worker
from worker.sweep import Sweep

Start = Callable[..., Worker]


def left(worker: Worker, table: Table) -> None:
    """Left in time, without a folder, an engine, or one that waits."""
    assert worker.stop()
    table.assert_nothing_left()
    assert not waiting_engines(table.settings.home)


def when(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, then: Callable[[], None]) -> None:
    """At the next call of this function do something else first."""
    before = getattr(place, name)

    def first_then(*arguments: Any, **named: Any) -> Any:
        then()
        return before(*arguments, **named)

    monkeypatch.setattr(place, name, first_then)


def test_an_idle_worker_leaves_with_the_engine_that_waits(settings: Settings, table: Table, start_worker: Start):
    worker = start_worker(slots=2)
    until(lambda: len(waiting_engines(settings.home)) == 4, "an engine for each slot, and its guard")
    left(worker, table)


def test_a_worker_without_a_database_leaves(settings: Settings, tmp_path: Path):
    nowhere = settings.model_copy(update={"database_url": f"sqlite:///{tmp_path}/no/such/folder/rows.db"})
    worker = Worker(nowhere, OPTIONS, listens=False, devices=[CPU])
    worker.start()
    assert not worker.looked
    assert worker.stop()


def test_a_worker_that_prepares_hands_its_job_back(table: Table, start_worker: Start, monkeypatch: pytest.MonkeyPatch):
    """It is told to leave while it looks through an input."""
    blob = table.files.put_stream([b"a teacher"])
    worker = start_worker()
    when(monkeypatch, run_job, "sha256", worker.drain)
    job_id = table.submit(steps=2, teacher=f"blob:sha256:{blob.sha256}")
    until(lambda: "released" in table.types(job_id), "the job to be handed back")
    left(worker, table)
    assert (table.job(job_id).status, table.job(job_id).attempts_without_progress) == ("queued", 0)
    assert "phase" not in table.types(job_id), "no engine was given it"


def test_a_worker_that_publishes_finishes(table: Table, start_worker: Start, monkeypatch: pytest.MonkeyPatch):
    worker = start_worker()
    when(monkeypatch, BlobStore, "put_file", worker.drain)
    job_id = table.submit(steps=2, checkpoint_every=100)
    table.assert_trained(job_id, 2)
    left(worker, table)


def test_a_worker_whose_engine_begins_hands_its_job_back(
    table: Table, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    """The request comes between the order and the engine's first word."""
    worker = start_worker()
    when(monkeypatch, supervision, "Child", worker.drain)
    job_id = table.submit(steps=100_000)
    until(lambda: table.job(job_id).status == "queued" and table.job(job_id).fence, "the job to be handed back")
    left(worker, table)
    assert table.job(job_id).attempts_without_progress == 0


def test_a_worker_that_cannot_reach_the_table_leaves_its_job_to_the_lease(
    table: Table, start_worker: Start, monkeypatch: pytest.MonkeyPatch
):
    job_id = table.submit(steps=100_000)
    worker = start_worker()
    table.until_checkpoint(job_id)

    def away() -> None:
        raise DatabaseUnavailable("gone for this test")

    monkeypatch.setattr(worker.desk.database, "begin", away)
    left(worker, table)
    assert (table.job(job_id).status, table.job(job_id).fence) == ("running", 1)
    assert not engines(table.settings.home)


def test_a_worker_leaves_a_table_that_hangs(
    start_worker: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A frozen server answers neither the sweep, nor the collection, nor a goodbye."""
    hanging, thawed = [], threading.Event()

    def hang(*_: Any) -> None:
        hanging.append(None)
        thawed.wait()

    monkeypatch.setattr(service, "LEAVES_IN_S", 0.1)
    monkeypatch.setattr(collection, "FIRST_LOOK_S", 0)
    for place, name in ((Sweep, "once"), (Collection, "once"), (service, "leave")):
        monkeypatch.setattr(place, name, hang)
    worker = start_worker()
    until(lambda: worker.looked and len(hanging) == 2, "the sweep and the collection to hang")
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    try:
        until(lambda: not stopping.is_alive(), "the worker to leave")
    finally:
        thawed.set()
        stopping.join()
    assert [name for name in ("sweep", "collection", "goodbye") if f"the {name} hangs" in caplog.text] == [
        "sweep",
        "collection",
        "goodbye",
    ]
