from typing import Any

from sqlalchemy import update

from store import tables, workers
from store.clock import database_now
from store.database import Database
from store.workers import Device


def slot(state: str = "idle", **more: Any) -> dict[str, Any]:
    return {"name": "cuda:0", "job": None, "state": state, "seen_s": 0.5, **more}


def silence(database: Database, worker_id: str, for_s: float) -> None:
    with database.begin() as connection:
        heard = update(tables.workers).where(tables.workers.c.id == worker_id)
        connection.execute(heard.values(seen_at=database_now() - for_s))


def consuming(database: Database) -> list[str]:
    with database.connect() as connection:
        return [worker.id for worker in workers.consuming(connection, lease_s=30)]


def test_a_worker_is_what_it_last_said(database: Database):
    with database.begin() as connection:
        workers.beat(connection, "w1", "host-7", [slot()], None)
        (first,) = workers.list(connection)
        workers.beat(connection, "w1", "host-7", [slot("busy", job="job_1")], "job_1")
        (later,) = workers.list(connection)
    assert (first.current_job, later.current_job) == (None, "job_1")
    assert first.devices == (Device("cuda:0", None, "idle", 0.5),)
    assert later.devices == (Device("cuda:0", "job_1", "busy", 0.5),)
    assert first.started_at == later.started_at <= later.seen_at
    assert 0 <= later.silent_s < 5


def test_one_that_is_not_heard_within_a_lease_consumes_no_more(database: Database):
    with database.begin() as connection:
        workers.beat(connection, "gone", "host-1", [slot()], None)
        workers.beat(connection, "here", "host-2", [slot()], None)
    silence(database, "gone", 31)
    assert consuming(database) == ["here"]
    with database.connect() as connection:
        assert {worker.id for worker in workers.list(connection)} == {"gone", "here"}


def test_one_that_is_heard_consumes_only_with_a_slot_that_is_not_stuck(database: Database):
    slots = {
        "busy": [slot("busy")],
        "half stuck": [slot("stuck"), slot("idle")],
        "of no use": [],
        "short of room": [slot("out_of_disk_space")],
        "stuck": [slot("stuck", seen_s=90.0), slot("stuck", seen_s=31.0)],
    }
    with database.begin() as connection:
        for name, devices in slots.items():
            workers.beat(connection, name, "host", devices, None)
    assert sorted(consuming(database)) == ["busy", "half stuck", "short of room"]


def test_what_an_older_worker_says_of_its_slots_counts_as_idle(database: Database):
    with database.begin() as connection:
        workers.beat(connection, "old", "host", [{"name": "cpu", "job": "job_1"}], "job_1")
        (old,) = workers.list(connection)
    assert old.devices == (Device("cpu", "job_1", "idle", 0.0),)
    assert consuming(database) == ["old"]


def test_the_silent_are_forgotten_after_a_day(database: Database):
    with database.begin() as connection:
        for name in ("yesterday's", "older"):
            workers.beat(connection, name, "host", [slot()], None)
    silence(database, "yesterday's", 86_300)
    silence(database, "older", 86_500)
    with database.begin() as connection:
        workers.beat(connection, "here", "host", [slot()], None)
        assert {worker.id for worker in workers.list(connection)} == {"yesterday's", "here"}


def test_a_worker_that_leaves_is_gone(database: Database):
    with database.begin() as connection:
        workers.beat(connection, "w1", "host-7", [], None)
        workers.leave(connection, "w1")
        assert list(workers.list(connection)) == []
