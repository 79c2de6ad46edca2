"""Row 3: a worker is killed with -9 at each point of an attempt. The job goes on from its newest whole checkpoint.

Only once its success is in the database nothing is run again. What it was killed in the middle of leaves at most a
temporary file, or a whole one that no row names.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.workers import PATIENT, QUICK, Night

JOB = {"steps": 40, "step_s": 0.01, "checkpoint_every": 10}


def nothing_begun(night: Night, job_id: str) -> None:
    assert not list(night.settings.home.glob("scratch/*"))
    assert night.db.types(job_id) == ["queued", "claimed"]


def no_step_told(night: Night, job_id: str) -> None:
    assert night.checkpoints(job_id) == []


def in_mid_epoch(night: Night, job_id: str) -> None:
    assert night.db.job(job_id).status == "running"


def half_a_checkpoint(night: Night, job_id: str) -> None:
    assert len(list(night.db.files.folder.rglob(".*.tmp"))) == 1
    assert _stored(night) <= {10}


def a_checkpoint_without_a_row(night: Night, job_id: str) -> None:
    assert _stored(night) == {10, 20}
    assert {checkpoint.step for checkpoint in night.checkpoints(job_id)} <= {10}


def a_row_and_an_old_file(night: Night, job_id: str) -> None:
    assert 10 in _stored(night)
    assert [checkpoint.step for checkpoint in night.checkpoints(job_id)] in ([30, 20], [40, 30])


def all_but_the_row_of_success(night: Night, job_id: str) -> None:
    assert night.db.job(job_id).phase == "publishing"
    assert len(list(night.db.files.folder.glob("blobs/*/*"))) == 2
    assert [checkpoint.step for checkpoint in night.checkpoints(job_id)] == [40, 30]


@pytest.mark.parametrize(
    ("failpoints", "fake", "as_left"),
    [
        ("", {"at": {"1": "kill_worker"}}, no_step_told),
        ("", {"at": {"25": "kill_worker"}}, in_mid_epoch),
        ("engine.started=kill", {}, no_step_told),
        ("blob.written=kill:2", {}, half_a_checkpoint),
        ("checkpoint.stored=kill:2", {}, a_checkpoint_without_a_row),
        ("checkpoint.superseded=kill", {}, a_row_and_an_old_file),
        ("publish.stored=kill", {}, all_but_the_row_of_success),
    ],
)
def test_the_job_goes_on_from_what_the_table_has(
    tmp_path: Path,
    sqlite_database_url: str,
    failpoints: str,
    fake: dict[str, Any],
    as_left: Callable[[Night, str], None],
):
    """The dead one's lock is free: no lease has to lapse, and the one here would last a minute."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        job_id = night.db.submit(**JOB, **fake, once=str(tmp_path / "once"))
        night.killed_at(failpoints)
        as_left(night, job_id)
        safe = max((checkpoint.step for checkpoint in night.checkpoints(job_id)), default=None)
        night.worker()
        night.assert_ended_well(job_id, JOB["steps"], ["failed", "succeeded"])
        told = [event.data["error"]["code"] for event in night.db.events(job_id) if "error" in event.data]
        assert told == ["worker_lost"]
        last = night.db.attempts(job_id)[-1]
        assert last.first_step == safe
        said = night.db.files.log_path(job_id, last.fence).read_text()
        assert (f"goes on after step {safe}\n" in said) == (safe is not None)
        night.assert_nothing_left()


def test_after_a_claim_and_before_anything_else_the_lease_decides(tmp_path: Path, database_url: str):
    """Nothing of it is on the disk yet that could prove its death."""
    with Night(tmp_path, database_url, **QUICK) as night:
        job_id = night.db.submit(**JOB)
        night.killed_at("claim.committed=kill")
        nothing_begun(night, job_id)
        night.worker()
        night.assert_ended_well(job_id, JOB["steps"], ["lost", "succeeded"])
        night.assert_nothing_left()


def test_after_the_row_of_success_nothing_runs_again(tmp_path: Path, database_url: str):
    with Night(tmp_path, database_url, **QUICK) as night:
        job_id = night.db.submit(**JOB)
        night.killed_at("finish_succeeded.committed=kill")
        ended = night.all_about(job_id)
        other = night.db.submit(steps=2)
        night.worker()
        night.db.assert_trained(other, 2)
        night.assert_ended_well(job_id, JOB["steps"], ["succeeded"])
        assert night.all_about(job_id) == ended
        night.assert_nothing_left()


def _stored(night: Night) -> set[int]:
    """The steps of which a whole checkpoint is on the disk, whatever the rows say."""
    return {int(path.stem) for path in night.db.files.folder.glob("checkpoints/*/*/*.pt")}
