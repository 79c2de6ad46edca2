from store import attempts, checkpoints, lifecycle
from store.database import Database
from tests.store.scene import ERROR, SHA256, claimed, lapse, running


def test_the_history_of_a_bad_night(database: Database):
    """Lost at step 0, failed at step 10, then still running."""
    job_id = running(database).job.id
    lapse(database, job_id)
    second = claimed(database, owner="another", rescue=True)
    with database.begin() as connection:
        checkpoints.record(connection, job_id, second.fence, step=10, sha256=SHA256, bytes=1, path="x")
        lifecycle.finish_failed(connection, job_id, second.fence, ERROR, 0)
    claimed(database)
    with database.connect() as connection:
        history = attempts.list(connection, job_id)
    assert [(attempt.fence, attempt.attempt, attempt.owner, attempt.how) for attempt in history] == [
        (1, 1, "worker", "lost"),
        (2, 2, "another", "failed"),
        (3, 1, "worker", None),
    ]
    assert [(attempt.first_step, attempt.last_step) for attempt in history] == [(None, None), (None, 10), (10, None)]
    assert all((attempt.ended_at is None) == (attempt.how is None) for attempt in history)
