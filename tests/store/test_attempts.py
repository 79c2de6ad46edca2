import pytest

from store import attempts, checkpoints, lifecycle
from store.database import Database
from store.errors import LeaseLost
from tests.clock import SettableClock
from tests.store.helpers import ERROR, LEASE_S, SHA256, claimed, running


def test_list_attempts_after_a_lost_and_a_failed_one(database: Database, clock: SettableClock):
    """Lost at step 0, failed at step 10, now running."""
    job_id = running(database).job.id
    clock.advance(LEASE_S + 1)
    second = claimed(database, owner="another", takeover=True)
    with database.begin() as connection:
        checkpoints.record(connection, job_id, second.fence, step=10, sha256=SHA256, bytes=1, path="x")
        lifecycle.finish_failed(connection, job_id, second.fence, ERROR, 0)
    claimed(database)
    with database.connect() as connection:
        history = attempts.list_attempts(connection, job_id)
    assert [(attempt.fence, attempt.attempts_without_progress, attempt.owner, attempt.how) for attempt in history] == [
        (1, 1, "worker", "lost"),
        (2, 2, "another", "failed"),
        (3, 1, "worker", None),
    ]
    assert [(attempt.first_step, attempt.last_step) for attempt in history] == [(None, None), (None, 10), (10, None)]
    assert all((attempt.ended_at is None) == (attempt.how is None) for attempt in history)


def test_begin_batch_is_true_until_the_batch_is_committed(database: Database):
    claim = running(database)

    def begin(batch: int) -> bool:
        with database.begin() as connection:
            return attempts.begin_batch(connection, claim.job.id, claim.fence, batch)

    assert [begin(1), begin(1), begin(2), begin(1), begin(4)] == [True, False, True, False, True]


def test_begin_batch_again_after_a_rollback(database: Database):
    claim = running(database)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), database.begin() as connection:
            assert attempts.begin_batch(connection, claim.job.id, claim.fence, 1)
            _ = 1 / 0


def test_begin_batch_counts_for_each_attempt(database: Database, clock: SettableClock):
    first = running(database)
    clock.advance(LEASE_S + 1)
    second = claimed(database, owner="another", takeover=True)
    with database.begin() as connection:
        assert attempts.begin_batch(connection, first.job.id, second.fence, 1)
        assert attempts.begin_batch(connection, first.job.id, first.fence, 1)


def test_begin_batch_without_an_attempt_raises_lease_lost(database: Database):
    claim = running(database)
    with pytest.raises(LeaseLost), database.begin() as connection:
        attempts.begin_batch(connection, claim.job.id, claim.fence + 1, 1)
