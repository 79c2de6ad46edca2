"""Row 8: the guard is killed with -9 while its engine trains. The worker ends the rest and tries again."""

from pathlib import Path

from proofs.faults.workers import LONG_LEASE, Workers


def test_guard_killed_engine_is_ended_and_the_job_continues(tmp_path: Path, sqlite_database_url: str):
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        job_id = workers.db.submit(steps=20, at={"12": "kill_guard"}, once=str(tmp_path / "once"))
        worker = workers.start()
        workers.assert_succeeded(job_id, 20, ["failed", "succeeded"])
        error = next(event.data["error"] for event in workers.db.events(job_id) if "error" in event.data)
        assert error["code"] == "worker_lost" and "SIGKILL" in error["message"]
        assert workers.db.attempts(job_id)[-1].owner == worker.context.owner
        workers.assert_nothing_left()
