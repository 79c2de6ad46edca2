"""Row 5: a host stands still for longer than a lease: worker, guard and engine alike.

When it wakes the guard looks at its clock, which went on, before it does anything else; and what the worker has still
to say comes from an attempt that has lost its job.
"""

from pathlib import Path

from tests.faults.workers import QUICK, Night, family, frozen, until_gone


def test_at_waking_the_guard_kills_and_nothing_late_is_taken(tmp_path: Path, sqlite_database_url: str):
    with Night(tmp_path, sqlite_database_url, **QUICK) as night:
        owner = night.process()
        job_id = night.db.submit(steps=20, at={"17": "wait"}, gate=str(tmp_path / "gate"))
        night.until_step(job_id, 17)
        training = family(owner.pid)[1:]
        with frozen(night.db, [owner.pid]):
            # The engine is woken first, the worker last: only the guard can have killed.
            with frozen(night.db, reversed(training)):
                night.worker(home=tmp_path / "elsewhere")
                night.until_taken_over(job_id)
            until_gone(training)
        night.until_turned_away(job_id)
        owner.terminate()
        (tmp_path / "gate").touch()
        night.assert_ended_well(job_id, 20, ["lost", "succeeded"])
        night.assert_nothing_left()
