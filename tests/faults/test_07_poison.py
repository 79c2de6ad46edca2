"""Row 7: a job that kills every worker that takes it fails once its attempts are spent, and holds up nobody else.

Attempts that get further are not counted: `tests/worker/test_run_job.py`.
"""

import signal
from pathlib import Path

from tests.faults.workers import PATIENT, Night


def test_it_is_given_up_and_the_job_behind_it_is_trained(tmp_path: Path, sqlite_database_url: str):
    """The killed cannot say what became of it: their successor does, at once, by their locks."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        poison = night.db.submit(max_attempts=2, steps=20, checkpoint_every=100, at={"3": "kill_worker"})
        behind = night.db.submit(steps=5)
        for _ in range(2):
            assert night.process().wait(60) == -signal.SIGKILL
        night.worker()
        job = night.db.until(poison, "failed")
        assert (job.error["code"], job.attempts_without_progress, job.fence) == ("worker_lost", 2, 2)
        assert [attempt.how for attempt in night.db.attempts(poison)] == ["failed", "failed"]
        night.assert_ended_well(behind, 5, ["succeeded"])
        night.assert_nothing_left()
