"""Row 4: only the worker is frozen for longer than its lease, and woken when another worker runs its job.

Its guard ends the training before the lease ends. When it wakes, all its writes are refused.
"""

from pathlib import Path

import pytest

from proofs.faults.workers import SHORT_LEASE, Workers, family, frozen, until_gone
from tests.worker.processes import until


def test_worker_frozen_in_training(tmp_path: Path, database_url: str):
    with Workers(tmp_path, database_url, **SHORT_LEASE) as workers:
        owner = workers.start_process()
        job_id = workers.db.submit(steps=20, at={"17": "wait"}, gate=str(tmp_path / "gate"))
        workers.until_step(job_id, 17)
        training = family(owner.pid)[1:]
        assert training
        with frozen(workers.db, [owner.pid]):
            workers.start(home=tmp_path / "elsewhere")
            until_gone(training)
            assert workers.db.job(job_id).fence == 1, "the training was dead before another worker could claim the job"
            workers.until_taken_over(job_id)
        workers.until_refused(job_id)
        owner.terminate()
        (tmp_path / "gate").touch()
        workers.assert_succeeded(job_id, 20, ["lost", "succeeded"])
        assert workers.db.attempts(job_id)[-1].first_step == 15
        workers.assert_nothing_left()


@pytest.mark.parametrize("moment", ["phase.committed", "publish.stored"])
def test_worker_frozen_in_publishing(tmp_path: Path, database_url: str, moment: str):
    """Before its files are stored, and between them and their row. The other worker's training waits at step 7, without
    any checkpoint, when the first worker tries to write its success."""
    gate = tmp_path / "gate"
    gate.touch()
    with Workers(tmp_path, database_url, **SHORT_LEASE) as workers:
        owner = workers.start_process(f"{moment}=hang")
        job_id = workers.db.submit(steps=20, checkpoint_every=1000, at={"7": "wait"}, gate=str(gate))
        until(lambda: workers.db.job(job_id).phase == "publishing", "the publishing to begin")
        with frozen(workers.db, [owner.pid]):
            gate.unlink()
            workers.start(home=tmp_path / "elsewhere")
            workers.until_taken_over(job_id)
        workers.until_refused(job_id)
        owner.terminate()
        gate.touch()
        workers.assert_succeeded(job_id, 20, ["lost", "succeeded"])
        workers.assert_nothing_left()
