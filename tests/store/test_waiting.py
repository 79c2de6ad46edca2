from collections.abc import Sequence

import pytest
from sqlalchemy import event, update

from store import jobs, lifecycle, tables, waiting, workers
from store.clock import database_now
from store.database import Database
from store.jobs import Job
from store.waiting import Waiting
from tests.store.scene import ERROR, claimed, now, running, submitted

LEASE_S = 30


def here(database: Database, worker_id: str, *states: str) -> None:
    devices = [{"name": f"cuda:{n}", "job": None, "state": state, "seen_s": 0.0} for n, state in enumerate(states)]
    with database.begin() as connection:
        workers.beat(connection, worker_id, "host", devices, None)


def why(database: Database, job: Job) -> Waiting:
    with database.connect() as connection:
        return waiting.reasons(connection, [job], LEASE_S)[job.id]


def positions(database: Database, found: Sequence[Job]) -> list[int | None]:
    with database.connect() as connection:
        told = waiting.reasons(connection, found, LEASE_S)
    return [told[job.id].position for job in found]


def test_place_in_line_counts_the_urgent_and_the_older(database: Database):
    old, young, urgent = submitted(database), submitted(database), submitted(database, priority=5)
    assert positions(database, [urgent, old, young]) == [1, 2, 3]
    claimed(database)
    assert positions(database, [old, young]) == [1, 2]


def test_one_that_backs_off_is_before_nobody_and_says_until_when_and_after_what(database: Database):
    first, second = running(database), submitted(database)
    with database.begin() as connection:
        lifecycle.finish_failed(connection, first.job.id, first.fence, ERROR, retry_in_s=60)
    again = now(database, first.job.id)
    told = why(database, again)
    assert (told.reason, told.until, told.position) == ("backing_off", again.not_before, None)
    assert told.message == (
        "the last attempt ended with out_of_memory: the device is full; the next one follows after a pause"
    )
    assert positions(database, [second]) == [1]
    with database.begin() as connection:
        connection.execute(update(tables.jobs).values(not_before=database_now() - 1))
    assert positions(database, [again, second]) == [1, 2], "due again, and as old as ever"


def test_without_a_worker_that_takes_jobs_nothing_starts(database: Database):
    job = submitted(database)
    assert why(database, job).reason == "no_worker"
    here(database, "hangs", "stuck", "stuck")
    assert why(database, job).reason == "no_worker"
    here(database, "silent", "idle")
    assert why(database, job).reason == "starting"
    with database.begin() as connection:
        connection.execute(update(tables.workers).values(seen_at=database_now() - LEASE_S - 1))
    assert why(database, job).reason == "no_worker"


def test_room_is_what_it_waits_for_only_where_every_worker_is_short_of_it(database: Database):
    job = submitted(database)
    here(database, "w1", "out_of_disk_space", "busy")
    here(database, "w2", "out_of_disk_space")
    assert why(database, job).reason == "out_of_disk_space"
    here(database, "w2", "busy")
    assert why(database, job).reason == "behind_others"
    here(database, "w2", "idle")
    assert why(database, job).reason == "starting"


@pytest.mark.parametrize(
    ("states", "told"),
    [
        (["idle", "idle"], ["starting", "starting", "behind_others"]),
        (["idle", "busy"], ["starting", "behind_others", "behind_others"]),
        (["busy"], ["behind_others"] * 3),
    ],
)
def test_as_many_start_as_slots_are_idle_and_the_others_stand_behind_them(
    database: Database, states: list[str], told: list[str]
):
    line = [submitted(database) for _ in range(3)]
    here(database, "w1", *states)
    with database.connect() as connection:
        found = waiting.reasons(connection, line, LEASE_S)
    assert [found[job.id].reason for job in line] == told
    assert all(found[job.id].until is None for job in line)


def test_how_many_are_ahead_is_said_in_numbers(database: Database):
    line = [submitted(database) for _ in range(3)]
    here(database, "w1", "busy", "idle")
    assert why(database, line[1]).message == "1 job is before it, 1 slot is busy"
    assert why(database, line[2]).message == "2 jobs are before it, 1 slot is busy"


def test_one_that_was_claimed_meanwhile_waits_for_nothing(database: Database):
    """Its row was read as queued; when the queue was asked, it had gone."""
    job = submitted(database)
    claimed(database)
    with database.connect() as connection:
        assert waiting.reasons(connection, [job], LEASE_S) == {}


def test_nothing_is_asked_for_jobs_that_do_not_wait(database: Database):
    claim = running(database)
    paused = submitted(database)
    with database.begin() as connection:
        found = [claim.job, jobs.pause(connection, paused.id)]
    asked: list[str] = []
    with database.connect() as connection:
        event.listen(connection, "before_cursor_execute", lambda *called: asked.append(called[2]))
        assert waiting.reasons(connection, found, LEASE_S) == {}
        assert asked == []
        waiting.reasons(connection, [*found, *[submitted(database) for _ in range(5)]], LEASE_S)
    looks = [statement for statement in asked if statement.startswith("SELECT")]
    assert len(looks) == 2, "once for all places, once for all workers"
