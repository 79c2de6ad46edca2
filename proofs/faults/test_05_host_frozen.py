"""Row 5: a host is frozen for longer than a lease: worker, guard and engine.

When it wakes, the guard first reads its clock, which did not stop. The writes of the worker are refused, because its
attempt has lost the job.
"""

from pathlib import Path

from proofs.faults.workers import SHORT_LEASE, Workers, family, frozen, until_gone


def test_host_frozen_guard_kills_at_waking_and_late_writes_are_refused(tmp_path: Path, sqlite_database_url: str):
    with Workers(tmp_path, sqlite_database_url, **SHORT_LEASE) as workers:
        owner = workers.start_process()
        job_id = workers.db.submit(steps=20, at={"17": "wait"}, gate=str(tmp_path / "gate"))
        workers.until_step(job_id, 17)
        training = family(owner.pid)[1:]
        with frozen(workers.db, [owner.pid]):
            # The engine is woken first, the worker last: only the guard can have killed.
            with frozen(workers.db, reversed(training)):
                workers.start(home=tmp_path / "elsewhere")
                workers.until_taken_over(job_id)
            until_gone(training)
        workers.until_refused(job_id)
        owner.terminate()
        (tmp_path / "gate").touch()
        workers.assert_succeeded(job_id, 20, ["lost", "succeeded"])
        workers.assert_nothing_left()
