"""Row 16: pause, resume, retry, and a worker that is drained, once or twice. No attempt is spent and no bit is lost.

The same with the real engine: `test_20_server_killed.py`.
"""

from pathlib import Path

import pytest

from proofs.faults.workers import LONG_LEASE, Workers
from store import jobs


def test_drain_requeues_the_job_and_is_idempotent(tmp_path: Path, database_url: str):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        job_id = workers.db.submit(steps=20, checkpoint_every=1000, at={"7": "loiter", "13": "loiter"})
        for step, times in ((7, 1), (13, 2)):
            leaving = workers.start_process()
            workers.until_step(job_id, step)
            for _ in range(times):
                leaving.terminate()
            assert leaving.wait(60) == 0
            requeued = workers.db.job(job_id)
            assert (requeued.status, requeued.attempts_without_progress, requeued.checkpoint_step) == (
                "queued",
                0,
                step + 1,
            )
        workers.start()
        workers.assert_succeeded(job_id, 20, ["released", "released", "succeeded"])
        assert [attempt.first_step for attempt in workers.db.attempts(job_id)] == [None, 8, 14]
        workers.assert_nothing_left()


def test_pause_and_resume(tmp_path: Path, database_url: str):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        job_id = workers.db.submit(steps=20, checkpoint_every=1000, at={"7": "loiter"})
        workers.start()
        workers.until_step(job_id, 7)
        workers.db.request(jobs.pause, job_id)
        paused = workers.db.until(job_id, "paused")
        assert (paused.attempts_without_progress, paused.checkpoint_step) == (0, 8)
        workers.assert_nothing_left()
        workers.db.request(jobs.resume, job_id)
        workers.assert_succeeded(job_id, 20, ["paused", "succeeded"])


@pytest.mark.parametrize("from_scratch", [False, True])
def test_retry_continues_or_starts_from_scratch(tmp_path: Path, database_url: str, from_scratch: bool):
    """The curve of the failed attempt ends at step 7, where it diverged; that of the retry is complete."""
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        workers.start()
        job_id = workers.db.submit(max_attempts=1, steps=20, at={"7": "diverge"}, once=str(tmp_path / "once"))
        workers.db.until(job_id, "failed")
        assert workers.db.job(job_id).checkpoint_step == 5
        assert (
            workers.db.request(
                lambda *job: jobs.retry(*job, from_scratch=from_scratch), job_id
            ).attempts_without_progress
            == 0
        )
        workers.assert_succeeded(job_id, 20, ["failed", "succeeded"])
        failed, again = workers.db.attempts(job_id)
        assert again.first_step == (None if from_scratch else failed.last_step)
        workers.assert_nothing_left()
