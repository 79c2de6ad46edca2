"""Row 5: a host stands still for longer than a lease: worker, guard and engine alike.

When it wakes the guard looks at its clock, which went on, before it does anything else; and the engine's lines come
from an attempt that has lost its job.
"""

from pathlib import Path

from tests.faults.workers import QUICK, Night, family, frozen, until_gone
from tests.worker.processes import until


def test_at_waking_the_guard_kills_and_nothing_late_is_taken(tmp_path: Path, sqlite_database_url: str):
    with Night(tmp_path, sqlite_database_url, **QUICK) as night:
        owner = night.process()
        job_id = night.table.submit(steps=150, step_s=0.02, checkpoint_every=10)
        night.table.until_checkpoint(job_id)
        everybody = family(owner.pid)
        with frozen(night.table, reversed(everybody)):
            night.worker(home=tmp_path / "elsewhere")
            night.assert_ended_well(job_id, 150, ["lost", "succeeded"])
            ended = night.all_about(job_id)
        # The engine was woken first, and would have seconds of training left.
        until_gone(everybody[1:])
        until(lambda: "fence 1 is stale" in night.log, "the worker to see that it is late")
        assert "goes on after" not in night.table.files.log_path(job_id, 1).read_text()
        assert night.all_about(job_id) == ended
        owner.terminate()
        assert owner.wait(60) == 0
        night.assert_nothing_left()
