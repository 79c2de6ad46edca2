"""Row 12: the connection is cut right after COMMIT, so that the writer does not get the answer.

An attempt writes its batch again and finds the batch's number, so the batch is not applied twice. A submit is sent
again with its key and gets the same job. A claim is not repeated: its lease expires, and the job is claimed again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proofs.faults.workers import LONG_LEASE, SHORT_LEASE, Workers
from store import jobs
from tests.servers import STEPS, api_process
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
def test_finish_written_twice_is_applied_once(
    tmp_path: Path, database_url: str, arm: Arm, move: str, fake: dict[str, Any], hows: list[str]
):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        arm(f"{move}.committed=away")
        job_id = workers.db.submit(steps=10, **fake, once=str(tmp_path / "once"))
        workers.start()
        workers.assert_succeeded(job_id, 10, hows)
        workers.assert_nothing_left()


@pytest.mark.parametrize("passing", [1, 2, 3])
def test_lines_written_twice_are_applied_once(tmp_path: Path, database_url: str, arm: Arm, passing: int):
    """The engine writes its lines slowly enough for several batches; each of the first three is tested."""
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        arm(f"lines.committed=away:{passing}")
        job_id = workers.db.submit(steps=10, step_s=0.1, checkpoint_every=1)
        workers.start()
        workers.assert_succeeded(job_id, 10, ["succeeded"])
        rows = [event.data for event in workers.db.events(job_id) if event.type in ("phase", "checkpoint")]
        assert [event.get("phase") or event["step"] for event in rows] == [
            "validating",
            "training",
            *range(1, 11),
            "exporting",
            "publishing",
        ]


def test_evidence_written_twice_is_applied_once(tmp_path: Path, database_url: str, arm: Arm):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        arm("append.committed=away")
        job_id = workers.db.submit(steps=10, at={"7": "vanish"}, once=str(tmp_path / "once"))
        workers.start()
        workers.assert_succeeded(job_id, 10, ["failed", "succeeded"])
        assert workers.db.types(job_id).count("warning") == 1


def test_discard_of_a_checkpoint_written_twice_is_applied_once(tmp_path: Path, database_url: str, arm: Arm):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        job_id = workers.db.submit(steps=10, at={"7": "diverge"}, once=str(tmp_path / "once"))
        workers.start()
        workers.db.until(job_id, "failed")
        for checkpoint in workers.checkpoints(job_id):
            (workers.db.files.folder / checkpoint.path).write_bytes(b"")
        arm("lines.committed=away")
        workers.db.request(jobs.retry, job_id)
        workers.assert_succeeded(job_id, 10, ["failed", "succeeded"])
        assert workers.db.types(job_id).count("warning") == 1


def test_pause_written_twice_is_applied_once(tmp_path: Path, database_url: str, arm: Arm):
    with Workers(tmp_path, database_url, **LONG_LEASE) as workers:
        arm("release.committed=away")
        job_id = workers.db.submit(steps=20, at={"6": "wait"}, gate=str(tmp_path / "gate"))
        workers.start()
        workers.db.until_checkpoint(job_id)
        workers.db.request(jobs.pause, job_id)
        assert workers.db.until(job_id, "paused").attempts_without_progress == 0
        until(lambda: not list(workers.settings.home.glob("scratch/*.lock")), "the attempt to end")
        assert workers.db.types(job_id).count("paused") == 1
        (tmp_path / "gate").touch()
        workers.db.request(jobs.resume, job_id)
        workers.assert_succeeded(job_id, 20, ["paused", "succeeded"])


def test_submit_sent_again_returns_the_same_job(tmp_path: Path, database_url: str):
    with (
        Workers(tmp_path, database_url, **LONG_LEASE) as workers,
        api_process(workers.settings, tmp_path / "log", "submit.committed=away") as api,
    ):
        cut = api.post("key")
        assert (cut.status_code, cut.json()["code"]) == (503, "unavailable")
        assert int(cut.headers["Retry-After"]) > 0
        again = api.post("key")
        assert again.status_code == 200
        assert again.headers["Idempotent-Replayed"] == "true"
        workers.start()
        workers.assert_succeeded(again.json()["id"], STEPS, ["succeeded"])
        with workers.db.database.connect() as connection:
            assert jobs.count_by_status(connection) == {"succeeded": 1}


def test_claim_without_an_answer_expires_and_the_job_is_claimed_again(tmp_path: Path, database_url: str, arm: Arm):
    with Workers(tmp_path, database_url, **SHORT_LEASE) as workers:
        arm("claim.committed=away")
        job_id = workers.db.submit(steps=5)
        workers.start()
        workers.assert_succeeded(job_id, 5, ["lost", "succeeded"])
        workers.assert_nothing_left()
