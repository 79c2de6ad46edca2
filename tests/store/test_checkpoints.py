from typing import Any

import pytest

from store import checkpoints, events, jobs, lifecycle
from store.database import Database
from store.errors import LeaseLost
from tests.clock import SettableClock
from tests.store.helpers import LEASE_S, SHA256, claimed, event_types, read_job, running


def test_list_checkpoints_furthest_first_then_newest_attempt(database: Database, clock: SettableClock):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 20)
    clock.advance(LEASE_S + 1)
    assert [checkpoint.step for checkpoint in claimed(database, takeover=True).checkpoints] == [20, 10]
    with database.begin() as connection:
        recorded(connection, job_id, 2, 20)
        rows = checkpoints.list_checkpoints(connection, job_id)
    assert [(checkpoint.step, checkpoint.fence) for checkpoint in rows] == [(20, 2), (20, 1), (10, 1)]
    assert (rows[0].path, rows[0].bytes, rows[0].sha256) == ("2/20.pt", 5, SHA256)


def test_record_never_decreases_checkpoint_step(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 20, 10)
    assert read_job(database, job_id).checkpoint_step == 20


def test_record_of_the_same_step_is_one_checkpoint(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 10)
        assert len(checkpoints.list_checkpoints(connection, job_id)) == 1
    assert event_types(database, job_id)[2:] == ["checkpoint", "checkpoint"]


def test_delete_superseded_keeps_two_and_returns_the_others(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 20, 30, 40)
        assert [checkpoint.path for checkpoint in checkpoints.delete_superseded(connection, job_id, 2)] == [
            "1/20.pt",
            "1/10.pt",
        ]
        assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(connection, job_id)] == [40, 30]
        assert checkpoints.delete_superseded(connection, job_id, 2) == []


def test_delete_broken_adds_a_warning(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 20)
        broken, whole = checkpoints.list_checkpoints(connection, job_id)
        checkpoints.delete_broken(connection, job_id, 1, broken, "20.pt is truncated")
        assert checkpoints.list_checkpoints(connection, job_id) == [whole]
        event = events.list_events(connection, job_id, 4, 10)[0]
    assert (event.type, event.data["code"], event.data["step"]) == ("warning", "checkpoint_skipped", 20)


def test_delete_broken_counts_progress_from_the_furthest_that_is_left(database: Database, clock: SettableClock):
    """Checkpoints of steps 20 and 100, the second broken. A job with one attempt is killed at 40, 60 and 80."""
    job_id = running(database, max_attempts=1).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 20, 100)
    for fence, discarded, reached in ((2, 100, 40), (3, None, 60), (4, None, 80)):
        clock.advance(LEASE_S + 1)
        claim = claimed(database, takeover=True)
        if discarded is not None:
            with database.begin() as connection:
                checkpoints.delete_broken(connection, job_id, fence, claim.checkpoints[0], "it is truncated")
            assert read_job(database, job_id).checkpoint_step == 20
        with database.begin() as connection:
            recorded(connection, job_id, fence, reached)
        assert read_job(database, job_id).checkpoint_step == reached
    clock.advance(LEASE_S + 1)
    assert claimed(database, takeover=True).job.attempts_without_progress == 1


def test_delete_broken_of_the_only_one_leaves_no_checkpoint_step(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10)
        checkpoints.delete_broken(
            connection, job_id, 1, checkpoints.list_checkpoints(connection, job_id)[0], "it is truncated"
        )
    assert read_job(database, job_id).checkpoint_step is None


def test_delete_broken_by_a_stale_attempt_raises_lease_lost(database: Database, clock: SettableClock):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10)
    clock.advance(LEASE_S + 1)
    broken = claimed(database, takeover=True).checkpoints[0]
    with pytest.raises(LeaseLost), database.begin() as connection:
        checkpoints.delete_broken(connection, job_id, 1, broken, "it is truncated")
    with database.connect() as connection:
        assert checkpoints.list_checkpoints(connection, job_id) == [broken]
    assert read_job(database, job_id).checkpoint_step == 10


def test_delete_expired_leaves_no_gap_in_the_events(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10)
        lifecycle.finish_cancelled(connection, job_id, 1)
        checkpoints.delete_expired(connection, job_id, retain_s=0)
        assert checkpoints.list_checkpoints(connection, job_id) == []
        jobs.retry(connection, job_id)
        numbers = [event.seq for event in events.list_events(connection, job_id, 0, 10)]
    assert numbers == [1, 2, 3, 4, 5]
    assert read_job(database, job_id).checkpoint_step is None


def recorded(connection: Any, job_id: str, fence: int, *steps: int) -> None:
    for step in steps:
        path = f"{fence}/{step}.pt"
        checkpoints.record(connection, job_id, fence, step=step, sha256=SHA256, bytes=5, path=path)
