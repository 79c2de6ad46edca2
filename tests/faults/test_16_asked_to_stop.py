"""Row 16: paused, resumed, retried, and a worker told to leave, once or twice. No attempt is spent, and no bit is lost.

The same with the real engine: `test_20_server_killed.py`.
"""

from pathlib import Path

import pytest

from store import jobs
from tests.faults.workers import PATIENT, Night


def test_a_worker_told_to_leave_hands_its_job_over_and_twice_is_once(tmp_path: Path, database_url: str):
    with Night(tmp_path, database_url, **PATIENT) as night:
        job_id = night.db.submit(steps=20, checkpoint_every=1000, at={"7": "loiter", "13": "loiter"})
        for step, times in ((7, 1), (13, 2)):
            leaving = night.process()
            night.until_step(job_id, step)
            for _ in range(times):
                leaving.terminate()
            assert leaving.wait(60) == 0
            handed_over = night.db.job(job_id)
            assert (handed_over.status, handed_over.attempts_without_progress, handed_over.checkpoint_step) == (
                "queued",
                0,
                step + 1,
            )
        night.worker()
        night.assert_ended_well(job_id, 20, ["released", "released", "succeeded"])
        assert [attempt.first_step for attempt in night.db.attempts(job_id)] == [None, 8, 14]
        night.assert_nothing_left()


def test_paused_it_waits_and_resumed_it_goes_on(tmp_path: Path, database_url: str):
    with Night(tmp_path, database_url, **PATIENT) as night:
        job_id = night.db.submit(steps=20, checkpoint_every=1000, at={"7": "loiter"})
        night.worker()
        night.until_step(job_id, 7)
        night.db.request(jobs.pause, job_id)
        paused = night.db.until(job_id, "paused")
        assert (paused.attempts_without_progress, paused.checkpoint_step) == (0, 8)
        night.assert_nothing_left()
        night.db.request(jobs.resume, job_id)
        night.assert_ended_well(job_id, 20, ["paused", "succeeded"])


@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_retry_goes_on_or_begins_anew_as_asked(tmp_path: Path, database_url: str, from_scratch: bool):
    """The failed run's curve ends at step 7, where it diverged; the other's is whole either way."""
    with Night(tmp_path, database_url, **PATIENT) as night:
        night.worker()
        job_id = night.db.submit(max_attempts=1, steps=20, at={"7": "diverge"}, once=str(tmp_path / "once"))
        night.db.until(job_id, "failed")
        assert night.db.job(job_id).checkpoint_step == 5
        assert (
            night.db.request(lambda *job: jobs.retry(*job, from_scratch=from_scratch), job_id).attempts_without_progress
            == 0
        )
        night.assert_ended_well(job_id, 20, ["failed", "succeeded"])
        failed, again = night.db.attempts(job_id)
        assert again.first_step == (None if from_scratch else failed.last_step)
        night.assert_nothing_left()
