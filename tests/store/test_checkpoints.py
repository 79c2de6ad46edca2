from typing import Any

import pytest

from store import checkpoints, events, jobs, lifecycle
from store.database import Database
from store.errors import LeaseLost
from tests.store.scene import SHA256, claimed, feed, lapse, now, running


def test_the_furthest_comes_first_and_of_one_step_the_latest_attempt(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 20)
    lapse(database, job_id)
    assert [checkpoint.step for checkpoint in claimed(database, rescue=True).checkpoints] == [20, 10]
    with database.begin() as connection:
        recorded(connection, job_id, 2, 20)
        found = checkpoints.newest(connection, job_id)
    assert [(checkpoint.step, checkpoint.fence) for checkpoint in found] == [(20, 2), (20, 1), (10, 1)]
    assert (found[0].path, found[0].bytes, found[0].sha256) == ("2/20.pt", 5, SHA256)


def test_the_row_knows_the_furthest_step_even_if_a_resumed_attempt_is_behind_it(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 20, 10)
    assert now(database, job_id).checkpoint_step == 20


def test_a_step_recorded_again_is_one_checkpoint(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 10)
        assert len(checkpoints.newest(connection, job_id)) == 1
    assert feed(database, job_id)[2:] == ["checkpoint", "checkpoint"]


def test_all_but_the_newest_two_are_forgotten_and_returned(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 20, 30, 40)
        assert [checkpoint.path for checkpoint in checkpoints.superseded(connection, job_id)] == ["1/20.pt", "1/10.pt"]
        assert [checkpoint.step for checkpoint in checkpoints.newest(connection, job_id)] == [40, 30]
        assert checkpoints.superseded(connection, job_id) == []


def test_a_broken_one_is_discarded_and_the_feed_says_so(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10, 20)
        broken, whole = checkpoints.newest(connection, job_id)
        checkpoints.discard(connection, job_id, 1, broken, "20.pt is cut short")
        assert checkpoints.newest(connection, job_id) == [whole]
        told = events.after(connection, job_id, 4, 10)[0]
    assert (told.type, told.data["code"], told.data["step"]) == ("warning", "checkpoint_skipped", 20)


def test_what_gets_further_than_what_a_broken_one_left_is_progress(database: Database):
    """Checkpoints of steps 20 and 100, the far one broken. Killed at 40, 60 and 80, a job of one attempt goes on."""
    job_id = running(database, max_attempts=1).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 20, 100)
    for fence, discarded, reached in ((2, 100, 40), (3, None, 60), (4, None, 80)):
        lapse(database, job_id)
        claim = claimed(database, rescue=True)
        if discarded is not None:
            with database.begin() as connection:
                checkpoints.discard(connection, job_id, fence, claim.checkpoints[0], "it is cut short")
            assert now(database, job_id).checkpoint_step == 20
        with database.begin() as connection:
            recorded(connection, job_id, fence, reached)
        assert now(database, job_id).checkpoint_step == reached
    lapse(database, job_id)
    assert claimed(database, rescue=True).attempts_without_progress == 1


def test_without_any_left_a_job_stands_at_its_beginning(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10)
        checkpoints.discard(connection, job_id, 1, checkpoints.newest(connection, job_id)[0], "it is cut short")
    assert now(database, job_id).checkpoint_step is None


def test_who_has_lost_the_job_discards_nothing(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10)
    lapse(database, job_id)
    broken = claimed(database, rescue=True).checkpoints[0]
    with pytest.raises(LeaseLost), database.begin() as connection:
        checkpoints.discard(connection, job_id, 1, broken, "it is cut short")
    with database.connect() as connection:
        assert checkpoints.newest(connection, job_id) == [broken]
    assert now(database, job_id).checkpoint_step == 10


def test_a_collection_that_forgets_them_leaves_no_gap_in_the_feed(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        recorded(connection, job_id, 1, 10)
        lifecycle.finish_cancelled(connection, job_id, 1)
        checkpoints.expire(connection, job_id, retain_s=0)
        assert checkpoints.newest(connection, job_id) == []
        jobs.retry(connection, job_id)
        numbers = [event.seq for event in events.after(connection, job_id, 0, 10)]
    assert numbers == [1, 2, 3, 4, 5]
    assert now(database, job_id).checkpoint_step is None


def recorded(connection: Any, job_id: str, fence: int, *steps: int) -> None:
    for step in steps:
        path = f"{fence}/{step}.pt"
        checkpoints.record(connection, job_id, fence, step=step, sha256=SHA256, bytes=5, path=path)
