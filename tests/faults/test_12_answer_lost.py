"""Row 12: the connection is cut right after COMMIT, so that whoever wrote does not know that it is written.

What an attempt writes is sent again, and finds that its number is in: done. A submit is sent again with its key and
gets the same job. Who claimed does not know of it: the lease lapses, and the job is claimed again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store import jobs
from tests.faults.servers import STEPS, api_process
from tests.faults.workers import PATIENT, QUICK, Night
from tests.worker.processes import until

Arm = Callable[[str], None]


@pytest.mark.parametrize(
    ("move", "fake", "hows"),
    [
        ("phase", {}, ["succeeded"]),
        ("finish_succeeded", {}, ["succeeded"]),
        ("finish_failed", {"at": {"7": "vanish"}}, ["failed", "succeeded"]),
    ],
)
def test_a_finish_that_is_written_twice_is_one(
    tmp_path: Path, database_url: str, arm: Arm, move: str, fake: dict[str, Any], hows: list[str]
):
    with Night(tmp_path, database_url, **PATIENT) as night:
        arm(f"{move}.committed=away")
        job_id = night.db.submit(steps=10, **fake, once=str(tmp_path / "once"))
        night.worker()
        night.assert_ended_well(job_id, 10, hows)
        night.assert_nothing_left()


@pytest.mark.parametrize("passing", [1, 2, 3])
def test_lines_that_are_written_twice_are_told_once(tmp_path: Path, database_url: str, arm: Arm, passing: int):
    """Whatever is in that batch: the engine says it slowly enough for several."""
    with Night(tmp_path, database_url, **PATIENT) as night:
        arm(f"lines.committed=away:{passing}")
        job_id = night.db.submit(steps=10, step_s=0.1, checkpoint_every=1)
        night.worker()
        night.assert_ended_well(job_id, 10, ["succeeded"])
        told = [event.data for event in night.db.events(job_id) if event.type in ("phase", "checkpoint")]
        assert [event.get("phase") or event["step"] for event in told] == [
            "validating",
            "training",
            *range(1, 11),
            "exporting",
            "publishing",
        ]


def test_evidence_that_is_written_twice_is_told_once(tmp_path: Path, database_url: str, arm: Arm):
    with Night(tmp_path, database_url, **PATIENT) as night:
        arm("append.committed=away")
        job_id = night.db.submit(steps=10, at={"7": "vanish"}, once=str(tmp_path / "once"))
        night.worker()
        night.assert_ended_well(job_id, 10, ["failed", "succeeded"])
        assert night.db.types(job_id).count("warning") == 1


def test_a_checkpoint_that_is_discarded_twice_is_told_of_once(tmp_path: Path, database_url: str, arm: Arm):
    with Night(tmp_path, database_url, **PATIENT) as night:
        job_id = night.db.submit(steps=10, at={"7": "diverge"}, once=str(tmp_path / "once"))
        night.worker()
        night.db.until(job_id, "failed")
        for checkpoint in night.checkpoints(job_id):
            (night.db.files.folder / checkpoint.path).write_bytes(b"")
        arm("lines.committed=away")
        night.db.request(jobs.retry, job_id)
        night.assert_ended_well(job_id, 10, ["failed", "succeeded"])
        assert night.db.types(job_id).count("warning") == 1


def test_a_pause_that_is_written_twice_is_one(tmp_path: Path, database_url: str, arm: Arm):
    with Night(tmp_path, database_url, **PATIENT) as night:
        arm("release.committed=away")
        job_id = night.db.submit(steps=20, at={"6": "wait"}, gate=str(tmp_path / "gate"))
        night.worker()
        night.db.until_checkpoint(job_id)
        night.db.request(jobs.pause, job_id)
        assert night.db.until(job_id, "paused").attempts_without_progress == 0
        until(lambda: not list(night.settings.home.glob("scratch/*.lock")), "the attempt to end")
        assert night.db.types(job_id).count("paused") == 1
        (tmp_path / "gate").touch()
        night.db.request(jobs.resume, job_id)
        night.assert_ended_well(job_id, 20, ["paused", "succeeded"])


def test_a_submit_without_an_answer_is_the_same_job_when_it_is_sent_again(tmp_path: Path, database_url: str):
    with (
        Night(tmp_path, database_url, **PATIENT) as night,
        api_process(night.settings, tmp_path / "log", "submit.committed=away") as api,
    ):
        cut = api.post("key")
        assert (cut.status_code, cut.json()["code"]) == (503, "unavailable")
        assert int(cut.headers["Retry-After"]) > 0
        again = api.post("key")
        assert again.status_code == 200
        assert again.headers["Idempotent-Replayed"] == "true"
        night.worker()
        night.assert_ended_well(again.json()["id"], STEPS, ["succeeded"])
        with night.db.database.connect() as connection:
            assert jobs.by_status(connection) == {"succeeded": 1}


def test_a_claim_without_an_answer_lapses_and_the_job_is_claimed_again(tmp_path: Path, database_url: str, arm: Arm):
    with Night(tmp_path, database_url, **QUICK) as night:
        arm("claim.committed=away")
        job_id = night.db.submit(steps=5)
        night.worker()
        night.assert_ended_well(job_id, 5, ["lost", "succeeded"])
        night.assert_nothing_left()
