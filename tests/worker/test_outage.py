"""The table out of reach for longer than a lease, at the end of a training and for longer than is believed.

That trainings go on and nobody takes them over, `tests/faults` proves: rows 11 and 13.
"""

import time
from collections.abc import Callable

from store.settings import Settings
from tests.worker.processes import until
from tests.worker.table import Table
from worker.service import Worker

Start = Callable[..., Worker]


def locked_for(table: Table, duration_s: float) -> None:
    """Hold SQLite's one write lock, as a writer does that froze in its transaction."""
    with table.database.begin():
        time.sleep(duration_s)


def test_a_finish_is_written_when_the_table_is_back(short_lease: Settings, table: Table, start_worker: Start):
    """The engine ends while nothing can be written."""
    job_id = table.submit(steps=30, step_s=0.02)
    start_worker(short_lease)
    until(lambda: table.job(job_id).progress, "the first step")
    locked_for(table, 1.5 * short_lease.lease_s)
    table.assert_trained(job_id, 30)
    assert len(table.attempts(job_id)) == 1


def test_too_long_without_proof_a_training_is_given_up(short_lease: Settings, table: Table, start_worker: Start):
    impatient = short_lease.model_copy(update={"max_unproven_s": 0.5})
    job_id = table.submit(steps=100, step_s=0.02, checkpoint_every=10)
    start_worker(impatient)
    table.until_checkpoint(job_id)
    locked_for(table, 1.5 * short_lease.lease_s)
    until(lambda: "released" in table.types(job_id), "the job to be handed back")
    table.assert_trained(job_id, 100)
    assert [attempt.how for attempt in table.attempts(job_id)] == ["released", "succeeded"]
