"""Row 4: a worker alone is frozen for longer than its lease, and woken when its job goes on elsewhere.

Its guard ends the training before the lease does; when it wakes, nothing that it still says is taken.
"""

from pathlib import Path

import pytest

from tests.faults.workers import QUICK, Night, family, frozen, until_gone
from tests.worker.processes import until


def test_in_training(tmp_path: Path, database_url: str):
    with Night(tmp_path, database_url, **QUICK) as night:
        owner = night.process()
        job_id = night.db.submit(steps=20, at={"17": "wait"}, gate=str(tmp_path / "gate"))
        night.until_step(job_id, 17)
        training = family(owner.pid)[1:]
        assert training
        with frozen(night.db, [owner.pid]):
            night.worker(home=tmp_path / "elsewhere")
            until_gone(training)
            assert night.db.job(job_id).fence == 1, "the training was dead before anybody else could claim"
            night.until_taken_over(job_id)
        night.until_turned_away(job_id)
        owner.terminate()
        (tmp_path / "gate").touch()
        night.assert_ended_well(job_id, 20, ["lost", "succeeded"])
        assert night.db.attempts(job_id)[-1].first_step == 15
        night.assert_nothing_left()


@pytest.mark.parametrize("moment", ["phase.committed", "publish.stored"])
def test_in_publishing(tmp_path: Path, database_url: str, moment: str):
    """Before its files are in the store, and between them and their row. The other host's training stands
    at step 7, for want of any checkpoint, when the first would make its success visible."""
    gate = tmp_path / "gate"
    gate.touch()
    with Night(tmp_path, database_url, **QUICK) as night:
        owner = night.process(f"{moment}=hang")
        job_id = night.db.submit(steps=20, checkpoint_every=1000, at={"7": "wait"}, gate=str(gate))
        until(lambda: night.db.job(job_id).phase == "publishing", "the publishing to begin")
        with frozen(night.db, [owner.pid]):
            gate.unlink()
            night.worker(home=tmp_path / "elsewhere")
            night.until_taken_over(job_id)
        night.until_turned_away(job_id)
        owner.terminate()
        gate.touch()
        night.assert_ended_well(job_id, 20, ["lost", "succeeded"])
        night.assert_nothing_left()
