"""Row 15: a job is cancelled at each point of its life.

A queued job never runs. A running one is `cancelled` when its process has ended; one whose files are published already
succeeds. Cancelling is idempotent. If the owner is dead, the sweep cancels the job.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from proofs.faults.conftest import Gate
from proofs.faults.workers import LONG_LEASE, SHORT_LEASE, Workers
from store import jobs
from store.errors import ActionNotAllowed
from tests.worker.job_database import ENDED, engines, worker_process
from tests.worker.processes import until

Arm = Callable[[str], None]
ENDLESS = {"steps": 100_000, "step_s": 0.02, "checkpoint_every": 100_000}


def cancelled_at_the_gate(workers: Workers, gate: Gate, **fake: object) -> str:
    """Run a job whose worker waits at the gate until the job is cancelled, and then continues to its end."""
    job_id = workers.db.submit(**fake)
    workers.start()
    gate.await_arrival()
    assert workers.db.request(jobs.cancel, job_id).status == "running"
    gate.open()
    workers.db.until(job_id, *ENDED)
    return job_id


def test_cancel_of_a_queued_job_that_never_runs(tmp_path: Path, database_url: str):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        unwanted, next_one = workers.db.submit(), workers.db.submit(steps=2)
        first, again = [workers.db.request(jobs.cancel, unwanted) for _ in range(2)]
        assert first == again
        assert first.status == "cancelled"
        workers.start()
        workers.db.assert_trained(next_one, 2)
        assert workers.db.types(unwanted) == ["queued", "cancelled"]
        assert workers.db.attempts(unwanted) == []


def test_cancel_just_after_the_claim_stops_at_the_first_heartbeat(
    tmp_path: Path, database_url: str, arm: Arm, gate: Gate
):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        arm("claim.committed=gate")
        job_id = cancelled_at_the_gate(workers, gate, **ENDLESS)
        assert workers.db.job(job_id).status == "cancelled"
        assert [attempt.how for attempt in workers.db.attempts(job_id)] == ["cancelled"]
        workers.assert_nothing_left()


def test_cancel_in_training_stops_after_the_step_and_is_idempotent(tmp_path: Path, database_url: str):
    with Workers(tmp_path, database_url, **{**LONG_LEASE, "stop_grace_s": 600}) as workers:
        job_id = workers.db.submit(**ENDLESS)
        workers.start()
        until(lambda: workers.db.job(job_id).progress, "the first step")
        responses = [workers.db.request(jobs.cancel, job_id) for _ in range(2)]
        assert [(job.status, job.requested, job.event_seq) for job in responses] == [
            ("running", "cancel", responses[0].event_seq)
        ] * 2
        job = workers.db.until(job_id, "cancelled")
        assert job.checkpoint_step is not None, "it was stopped at a step, and not killed"
        types = workers.db.types(job_id)
        assert (types.count("cancel_requested"), types.count("cancelled")) == (1, 1)
        assert [attempt.how for attempt in workers.db.attempts(job_id)] == ["cancelled"]
        workers.assert_nothing_left()


def test_cancel_in_publishing_lets_the_job_succeed(tmp_path: Path, database_url: str, arm: Arm, gate: Gate):
    """The request is on the row and the files are stored: the next write is the success, and it is accepted."""
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        arm("publish.stored=gate")
        job_id = cancelled_at_the_gate(workers, gate, steps=3)
        workers.assert_succeeded(job_id, 3, ["succeeded"])
        assert workers.db.types(job_id)[-2:] == ["cancel_requested", "succeeded"]
        with pytest.raises(ActionNotAllowed, match="succeeded"):
            workers.db.request(jobs.cancel, job_id)
        workers.assert_nothing_left()


def test_cancel_of_a_dead_owners_job_is_done_by_the_sweep(tmp_path: Path, database_url: str):
    """On another host: no lock proves its death, so the lease has to expire."""
    with Workers(tmp_path, database_url, **SHORT_LEASE) as workers:
        elsewhere = workers.settings.model_copy(update={"home": tmp_path / "elsewhere"})
        job_id = workers.db.submit(**ENDLESS)
        with worker_process(elsewhere, tmp_path / "elsewhere.log") as owner:
            until(lambda: workers.db.job(job_id).progress, "the first step")
            owner.kill()
            owner.wait()
        assert workers.db.request(jobs.cancel, job_id).status == "running"
        workers.start()
        assert workers.db.until(job_id, *ENDED).status == "cancelled"
        assert [attempt.how for attempt in workers.db.attempts(job_id)] == ["lost"]
        assert workers.db.types(job_id)[-2:] == ["cancel_requested", "cancelled"]
        until(lambda: not engines(elsewhere.home), "the guard to end the training")
