"""Row 15: a job is cancelled at each point of its life.

A queued one never runs. A running one is asked, and is `cancelled` when its process has ended; one whose files are
published already succeeds. Asking twice is asking once. What a dead owner was asked the sweep does.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from store import jobs
from store.errors import ActionNotAllowed
from tests.faults.conftest import Gate
from tests.faults.workers import PATIENT, QUICK, Night
from tests.worker.processes import until
from tests.worker.job_database import ENDED, engines, worker_process

Arm = Callable[[str], None]
ENDLESS = {"steps": 100_000, "step_s": 0.02, "checkpoint_every": 100_000}


def cancelled_at_the_gate(night: Night, gate: Gate, **fake: object) -> str:
    """A worker that waits there until its job has been cancelled, and then goes on to its end."""
    job_id = night.db.submit(**fake)
    night.worker()
    gate.await_arrival()
    assert night.db.request(jobs.cancel, job_id).status == "running"
    gate.open()
    night.db.until(job_id, *ENDED)
    return job_id


def test_a_queued_one_never_runs(tmp_path: Path, database_url: str):
    with Night(tmp_path, database_url, **PATIENT) as night:
        unwanted, next_one = night.db.submit(), night.db.submit(steps=2)
        first, again = [night.db.request(jobs.cancel, unwanted) for _ in range(2)]
        assert first == again
        assert first.status == "cancelled"
        night.worker()
        night.db.assert_trained(next_one, 2)
        assert night.db.types(unwanted) == ["queued", "cancelled"]
        assert night.db.attempts(unwanted) == []


def test_just_claimed_it_is_stopped_by_the_first_heartbeat(tmp_path: Path, database_url: str, arm: Arm, gate: Gate):
    with Night(tmp_path, database_url, **PATIENT) as night:
        arm("claim.committed=gate")
        job_id = cancelled_at_the_gate(night, gate, **ENDLESS)
        assert night.db.job(job_id).status == "cancelled"
        assert [attempt.how for attempt in night.db.attempts(job_id)] == ["cancelled"]
        night.assert_nothing_left()


def test_in_training_it_stops_after_the_step_and_asking_twice_is_asking_once(tmp_path: Path, database_url: str):
    with Night(tmp_path, database_url, **{**PATIENT, "stop_grace_s": 600}) as night:
        job_id = night.db.submit(**ENDLESS)
        night.worker()
        until(lambda: night.db.job(job_id).progress, "the first step")
        asked = [night.db.request(jobs.cancel, job_id) for _ in range(2)]
        assert [(job.status, job.requested, job.event_seq) for job in asked] == [
            ("running", "cancel", asked[0].event_seq)
        ] * 2
        job = night.db.until(job_id, "cancelled")
        assert job.checkpoint_step is not None, "it was stopped at a step, and not killed"
        types = night.db.types(job_id)
        assert (types.count("cancel_requested"), types.count("cancelled")) == (1, 1)
        assert [attempt.how for attempt in night.db.attempts(job_id)] == ["cancelled"]
        night.assert_nothing_left()


def test_in_publishing_who_was_done_is_done(tmp_path: Path, database_url: str, arm: Arm, gate: Gate):
    """The request is on the row, the files are in the store: the next write is the success, and it is let through."""
    with Night(tmp_path, database_url, **PATIENT) as night:
        arm("publish.stored=gate")
        job_id = cancelled_at_the_gate(night, gate, steps=3)
        night.assert_ended_well(job_id, 3, ["succeeded"])
        assert night.db.types(job_id)[-2:] == ["cancel_requested", "succeeded"]
        with pytest.raises(ActionNotAllowed, match="succeeded"):
            night.db.request(jobs.cancel, job_id)
        night.assert_nothing_left()


def test_of_a_dead_owner_the_sweep_does_it(tmp_path: Path, database_url: str):
    """On another host: no lock proves the death, the lease has to lapse."""
    with Night(tmp_path, database_url, **QUICK) as night:
        elsewhere = night.settings.model_copy(update={"home": tmp_path / "elsewhere"})
        job_id = night.db.submit(**ENDLESS)
        with worker_process(elsewhere, tmp_path / "elsewhere.log") as owner:
            until(lambda: night.db.job(job_id).progress, "the first step")
            owner.kill()
            owner.wait()
        assert night.db.request(jobs.cancel, job_id).status == "running"
        night.worker()
        assert night.db.until(job_id, *ENDED).status == "cancelled"
        assert [attempt.how for attempt in night.db.attempts(job_id)] == ["lost"]
        assert night.db.types(job_id)[-2:] == ["cancel_requested", "cancelled"]
        until(lambda: not engines(elsewhere.home), "the guard to end the training")
