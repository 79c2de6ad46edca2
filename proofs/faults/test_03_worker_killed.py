"""Row 3: a worker is killed with -9 at each point of an attempt. The job continues from its newest complete checkpoint.

After its success is committed nothing runs again. An interrupted write leaves at most a temporary file, or a complete
file that no row names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proofs.faults.workers import LONG_LEASE, SHORT_LEASE, Workers

JOB = {"steps": 40, "step_s": 0.01, "checkpoint_every": 10}


def nothing_has_begun(workers: Workers, job_id: str) -> None:
    assert not list(workers.settings.home.glob("scratch/*"))
    assert workers.db.types(job_id) == ["queued", "claimed"]


def no_checkpoint_yet(workers: Workers, job_id: str) -> None:
    assert workers.checkpoints(job_id) == []


def in_training(workers: Workers, job_id: str) -> None:
    assert workers.db.job(job_id).status == "running"


def half_a_checkpoint(workers: Workers, job_id: str) -> None:
    assert len(list(workers.db.files.folder.rglob(".*.tmp"))) == 1
    assert _stored(workers) <= {10}


def a_checkpoint_without_a_row(workers: Workers, job_id: str) -> None:
    assert _stored(workers) == {10, 20}
    assert {checkpoint.step for checkpoint in workers.checkpoints(job_id)} <= {10}


def a_row_and_an_old_file(workers: Workers, job_id: str) -> None:
    assert 10 in _stored(workers)
    assert [checkpoint.step for checkpoint in workers.checkpoints(job_id)] in ([30, 20], [40, 30])


def all_but_the_row_of_success(workers: Workers, job_id: str) -> None:
    assert workers.db.job(job_id).phase == "publishing"
    assert len(list(workers.db.files.folder.glob("blobs/*/*"))) == 2
    assert [checkpoint.step for checkpoint in workers.checkpoints(job_id)] == [40, 30]


@pytest.mark.parametrize(
    ("failpoints", "fake", "as_left"),
    [
        ("", {"at": {"1": "kill_worker"}}, no_checkpoint_yet),
        ("", {"at": {"25": "kill_worker"}}, in_training),
        ("engine.started=kill", {}, no_checkpoint_yet),
        ("blob.written=kill:2", {}, half_a_checkpoint),
        ("checkpoint.stored=kill:2", {}, a_checkpoint_without_a_row),
        ("checkpoint.superseded=kill", {}, a_row_and_an_old_file),
        ("publish.stored=kill", {}, all_but_the_row_of_success),
    ],
)
def test_worker_killed_job_continues_from_its_newest_row(
    tmp_path: Path,
    sqlite_database_url: str,
    failpoints: str,
    fake: dict[str, Any],
    as_left: Callable[[Workers, str], None],
):
    """The lock of the dead worker is free, so the job does not wait for its lease of a minute."""
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        job_id = workers.db.submit(**JOB, **fake, once=str(tmp_path / "once"))
        workers.run_until_killed(failpoints)
        as_left(workers, job_id)
        safe = max((checkpoint.step for checkpoint in workers.checkpoints(job_id)), default=None)
        workers.start()
        workers.assert_succeeded(job_id, JOB["steps"], ["failed", "succeeded"])
        errors = [event.data["error"]["code"] for event in workers.db.events(job_id) if "error" in event.data]
        assert errors == ["worker_lost"]
        last = workers.db.attempts(job_id)[-1]
        assert last.first_step == safe
        log = workers.db.files.log_path(job_id, last.fence).read_text()
        assert (f"continues after step {safe}\n" in log) == (safe is not None)
        workers.assert_nothing_left()


def test_worker_killed_just_after_its_claim_the_lease_decides(tmp_path: Path, database_url: str):
    """No file that could prove its death is on the disk yet."""
    with Workers(tmp_path, database_url, **SHORT_LEASE) as workers:
        job_id = workers.db.submit(**JOB)
        workers.run_until_killed("claim.committed=kill")
        nothing_has_begun(workers, job_id)
        workers.start()
        workers.assert_succeeded(job_id, JOB["steps"], ["lost", "succeeded"])
        workers.assert_nothing_left()


def test_worker_killed_after_the_success_nothing_runs_again(tmp_path: Path, database_url: str):
    with Workers(tmp_path, database_url, **SHORT_LEASE) as workers:
        job_id = workers.db.submit(**JOB)
        workers.run_until_killed("finish_succeeded.committed=kill")
        ended = workers.snapshot(job_id)
        other = workers.db.submit(steps=2)
        workers.start()
        workers.db.assert_trained(other, 2)
        workers.assert_succeeded(job_id, JOB["steps"], ["succeeded"])
        assert workers.snapshot(job_id) == ended
        workers.assert_nothing_left()


def _stored(workers: Workers) -> set[int]:
    """The steps with a complete checkpoint on the disk, with or without a row."""
    return {int(path.stem) for path in workers.db.files.folder.glob("checkpoints/*/*/*.pt")}
