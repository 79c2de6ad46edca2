"""Row 7: a job that kills every worker fails after its attempts, and other jobs run.

Attempts that get further are not counted: `tests/worker/test_attempt.py`.
"""

import signal
from pathlib import Path

from proofs.faults.workers import LONG_LEASE, Workers


def test_poison_job_fails_and_the_next_job_succeeds(tmp_path: Path, sqlite_database_url: str):
    """The next worker sees by the locks that the others are dead, and requeues the job at once."""
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        poison = workers.db.submit(max_attempts=2, steps=20, checkpoint_every=100, at={"3": "kill_worker"})
        behind = workers.db.submit(steps=5)
        for _ in range(2):
            assert workers.start_process().wait(60) == -signal.SIGKILL
        workers.start()
        job = workers.db.until(poison, "failed")
        assert (job.error["code"], job.attempts_without_progress, job.fence) == ("worker_lost", 2, 2)
        assert [attempt.how for attempt in workers.db.attempts(poison)] == ["failed", "failed"]
        workers.assert_succeeded(behind, 5, ["succeeded"])
        workers.assert_nothing_left()
