"""Row 8: the guard is killed with -9 while its engine trains. The worker sees it end, ends the session, tries again."""

from pathlib import Path

from tests.faults.workers import PATIENT, Night


def test_the_engine_goes_with_it_and_the_job_goes_on(tmp_path: Path, sqlite_database_url: str):
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        job_id = night.db.submit(steps=20, at={"12": "kill_guard"}, once=str(tmp_path / "once"))
        worker = night.worker()
        night.assert_ended_well(job_id, 20, ["failed", "succeeded"])
        error = next(event.data["error"] for event in night.db.events(job_id) if "error" in event.data)
        assert error["code"] == "worker_lost" and "SIGKILL" in error["message"]
        assert night.db.attempts(job_id)[-1].owner == worker.context.owner
        night.assert_nothing_left()
