"""Row 4: a worker alone is frozen for longer than its lease, and woken when its job has gone on elsewhere.

Its guard ends the training before the lease does; when it wakes, nothing that it still says is taken.
"""

from pathlib import Path

import pytest

from tests.faults.workers import QUICK, Night, family, frozen, until_gone
from tests.worker.processes import until

STALE = "is stale, another attempt owns the job"


def test_in_training(tmp_path: Path, database_url: str):
    with Night(tmp_path, database_url, **QUICK) as night:
        owner = night.process()
        job_id = night.table.submit(steps=20, at={"15": "loiter"}, once=str(tmp_path / "once"))
        night.table.until_checkpoint(job_id)
        successor = night.worker(home=tmp_path / "elsewhere")
        training = family(owner.pid)[1:]
        assert training
        with frozen(night.table, [owner.pid]):
            until_gone(training)
            assert night.table.job(job_id).fence == 1, "the training was dead before anybody else could claim"
            night.assert_ended_well(job_id, 20, ["lost", "succeeded"])
            assert night.table.attempts(job_id)[-1].owner == successor.desk.owner
            ended = night.all_about(job_id)
        until(lambda: STALE in night.log, "the frozen one to see that it is late")
        assert night.all_about(job_id) == ended
        owner.terminate()
        assert owner.wait(60) == 0
        night.assert_nothing_left()


@pytest.mark.parametrize("moment", ["phase.committed", "publish.stored"])
def test_in_publishing(tmp_path: Path, database_url: str, moment: str):
    """Before its files are in the store, and between them and their row."""
    with Night(tmp_path, database_url, **QUICK) as night:
        owner = night.process(f"{moment}=hang")
        job_id = night.table.submit(steps=20, step_s=0.01)
        until(lambda: night.table.job(job_id).phase == "publishing", "the publishing to begin")
        with frozen(night.table, [owner.pid]):
            night.worker(home=tmp_path / "elsewhere")
            night.assert_ended_well(job_id, 20, ["lost", "succeeded"])
            ended = night.all_about(job_id)
        until(lambda: STALE in night.log, "the frozen one to see that it is late")
        assert night.all_about(job_id) == ended
        owner.terminate()
        assert owner.wait(60) == 0
        night.assert_nothing_left()
