from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import event

from store import jobs, lifecycle
from store.database import Database
from store.records import Job
from store.workers import (
    Device,
    Waiting,
    Worker,
    delete_worker,
    list_consuming,
    list_workers,
    record_heartbeat,
    waiting_reasons,
)
from tests.clock import SettableClock
from tests.store.helpers import ERROR, LEASE_S, claimed, read_job, running, submitted


def slot(state: str = "idle", **more: Any) -> dict[str, Any]:
    return {"name": "cuda:0", "job": None, "state": state, "seen_s": 0.5, **more}


def heartbeat(database: Database, worker_id: str, *slots: dict[str, Any], current_job: str | None = None) -> Worker:
    """Record a worker's heartbeat. Returns the worker as it is listed."""
    with database.begin() as connection:
        record_heartbeat(connection, worker_id, "host-7", slots, current_job)
        return next(worker for worker in list_workers(connection) if worker.id == worker_id)


def listed(database: Database) -> set[str]:
    with database.connect() as connection:
        return {worker.id for worker in list_workers(connection)}


def consuming(database: Database) -> list[str]:
    with database.connect() as connection:
        return [worker.id for worker in list_consuming(connection, LEASE_S)]


def reason(database: Database, job: Job) -> Waiting:
    with database.connect() as connection:
        return waiting_reasons(connection, [job], LEASE_S)[job.id]


def positions(database: Database, page: Sequence[Job]) -> list[int | None]:
    with database.connect() as connection:
        waits = waiting_reasons(connection, page, LEASE_S)
    return [waits[job.id].position for job in page]


def test_list_workers_has_the_last_heartbeat(database: Database):
    first = heartbeat(database, "w1", slot())
    later = heartbeat(database, "w1", slot("busy", job="job_1"), current_job="job_1")
    assert (first.current_job, later.current_job) == (None, "job_1")
    assert first.devices == (Device("cuda:0", None, "idle", 0.5),)
    assert later.devices == (Device("cuda:0", "job_1", "busy", 0.5),)
    assert first.started_at == later.started_at <= later.seen_at
    assert 0 <= later.silent_s < 5


def test_list_consuming_needs_a_heartbeat_within_a_lease(database: Database, clock: SettableClock):
    heartbeat(database, "silent", slot())
    clock.advance(LEASE_S + 1)
    heartbeat(database, "here", slot())
    assert consuming(database) == ["here"]
    assert listed(database) == {"silent", "here"}


def test_list_consuming_needs_a_slot_that_is_not_stuck(database: Database):
    heartbeat(database, "busy", slot("busy"))
    heartbeat(database, "half stuck", slot("stuck"), slot("idle"))
    heartbeat(database, "without slots")
    heartbeat(database, "out of disk space", slot("out_of_disk_space"))
    heartbeat(database, "stuck", slot("stuck", seen_s=90.0), slot("stuck", seen_s=31.0))
    assert sorted(consuming(database)) == ["busy", "half stuck", "out of disk space"]


def test_device_without_a_state_is_idle(database: Database):
    worker = heartbeat(database, "old", {"name": "cpu", "job": "job_1"}, current_job="job_1")
    assert worker.devices == (Device("cpu", "job_1", "idle", 0.0),)
    assert consuming(database) == ["old"]


def test_record_heartbeat_deletes_workers_silent_for_a_day(database: Database, clock: SettableClock):
    heartbeat(database, "older", slot())
    clock.advance(200)
    heartbeat(database, "yesterday's", slot())
    clock.advance(86_300)
    heartbeat(database, "here", slot())
    assert listed(database) == {"yesterday's", "here"}


def test_delete_worker_removes_its_row(database: Database):
    heartbeat(database, "w1")
    with database.begin() as connection:
        delete_worker(connection, "w1")
    assert listed(database) == set()


def test_waiting_reasons_position_by_priority_then_age(database: Database):
    old, young, urgent = submitted(database), submitted(database), submitted(database, priority=5)
    assert positions(database, [urgent, old, young]) == [1, 2, 3]
    claimed(database)
    assert positions(database, [old, young]) == [1, 2]


def test_waiting_reasons_backing_off_has_a_time_and_no_position(database: Database, clock: SettableClock):
    first, second = running(database), submitted(database)
    with database.begin() as connection:
        lifecycle.finish_failed(connection, first.job.id, first.fence, ERROR, retry_in_s=60)
    again = read_job(database, first.job.id)
    waiting = reason(database, again)
    assert (waiting.reason, waiting.until, waiting.position) == ("backing_off", again.not_before, None)
    assert waiting.message == (
        "the last attempt ended with out_of_memory: the device is full; the next one follows after a pause"
    )
    assert positions(database, [second]) == [1]
    clock.advance(61)
    assert positions(database, [again, second]) == [1, 2], "it is due again, in its old place"


def test_waiting_reasons_no_worker(database: Database, clock: SettableClock):
    job = submitted(database)
    assert reason(database, job).reason == "no_worker"
    heartbeat(database, "stuck", slot("stuck"), slot("stuck"))
    assert reason(database, job).reason == "no_worker"
    heartbeat(database, "w1", slot("idle"))
    assert reason(database, job).reason == "starting"
    clock.advance(LEASE_S + 1)
    assert reason(database, job).reason == "no_worker"


def test_waiting_reasons_out_of_disk_space_only_if_every_worker_is(database: Database):
    job = submitted(database)
    heartbeat(database, "w1", slot("out_of_disk_space"), slot("busy"))
    heartbeat(database, "w2", slot("out_of_disk_space"))
    assert reason(database, job).reason == "out_of_disk_space"
    heartbeat(database, "w2", slot("busy"))
    assert reason(database, job).reason == "behind_others"
    heartbeat(database, "w2", slot("idle"))
    assert reason(database, job).reason == "starting"


@pytest.mark.parametrize(
    ("states", "reasons"),
    [
        (["idle", "idle"], ["starting", "starting", "behind_others"]),
        (["idle", "busy"], ["starting", "behind_others", "behind_others"]),
        (["busy"], ["behind_others"] * 3),
    ],
)
def test_waiting_reasons_as_many_jobs_start_as_slots_are_idle(
    database: Database, states: list[str], reasons: list[str]
):
    queue = [submitted(database) for _ in range(3)]
    heartbeat(database, "w1", *map(slot, states))
    with database.connect() as connection:
        waits = waiting_reasons(connection, queue, LEASE_S)
    assert [waits[job.id].reason for job in queue] == reasons
    assert all(waits[job.id].until is None for job in queue)


def test_waiting_reasons_behind_others_counts_them(database: Database):
    queue = [submitted(database) for _ in range(3)]
    heartbeat(database, "w1", slot("busy"))
    assert reason(database, queue[0]).message == "1 slot is busy"
    heartbeat(database, "w1", slot("busy"), slot("idle"))
    assert reason(database, queue[1]).message == "1 job is before it, 1 slot is busy"
    assert reason(database, queue[2]).message == "2 jobs are before it, 1 slot is busy"


def test_waiting_reasons_without_a_job_that_was_claimed_meanwhile(database: Database):
    """Its row was read as queued; then a worker claimed it."""
    job = submitted(database)
    claimed(database)
    with database.connect() as connection:
        assert waiting_reasons(connection, [job], LEASE_S) == {}


def test_waiting_reasons_runs_three_queries_for_a_page_and_none_without_queued_jobs(database: Database):
    claim = running(database)
    paused = submitted(database)
    with database.begin() as connection:
        page = [claim.job, jobs.pause(connection, paused.id)]
    statements: list[str] = []
    with database.connect() as connection:
        event.listen(connection, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
        assert waiting_reasons(connection, page, LEASE_S) == {}
        assert statements == []
        waiting_reasons(connection, [*page, *[submitted(database) for _ in range(5)]], LEASE_S)
    queries = [statement for statement in statements if statement.startswith("SELECT")]
    assert len(queries) == 3, "one each for all positions, all workers, and the limits of projects"
