"""Row 18: the newest checkpoint is not what its row says. It is skipped by name, and the one before is used."""

from collections.abc import Callable
from pathlib import Path

import pytest

from store import jobs
from store.checkpoints import Checkpoint
from tests.faults.workers import PATIENT, Night


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def gone(path: Path) -> None:
    path.unlink()


def of_another_attempt(path: Path) -> None:
    """A whole one, under this one's name."""
    path.write_text('{"step": 9, "weights": "of a stale attempt"}')


@pytest.mark.parametrize("harm", [cut_short, one_bit_flipped, emptied, gone, of_another_attempt])
def test_the_one_before_is_used(tmp_path: Path, sqlite_database_url: str, harm: Callable[[Path], None]):
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        job_id, (newest, before) = _stopped_after_two(night)
        harm(_file(night, newest))
        night.db.request(jobs.retry, job_id)
        night.assert_ended_well(job_id, 20, ["failed", "succeeded"])
        assert _skipped(night, job_id) == [newest.step]
        assert _goes_on_after(night, job_id) == f"{before.step}"
        night.assert_nothing_left()


def test_without_a_whole_one_it_begins_anew(tmp_path: Path, sqlite_database_url: str):
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        job_id, (newest, before) = _stopped_after_two(night)
        emptied(_file(night, newest))
        one_bit_flipped(_file(night, before))
        night.db.request(jobs.retry, job_id)
        night.assert_ended_well(job_id, 20, ["failed", "succeeded"])
        assert _skipped(night, job_id) == [newest.step, before.step]
        assert _goes_on_after(night, job_id) is None


def test_a_file_that_no_row_names_is_never_gone_on_from(tmp_path: Path, sqlite_database_url: str):
    """A stale attempt may still write under its own fence, and further than anybody: its row is refused."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        job_id, (newest, _) = _stopped_after_two(night)
        of_another_attempt(_file(night, newest).with_name("000000019.pt"))
        night.db.request(jobs.retry, job_id)
        night.assert_ended_well(job_id, 20, ["failed", "succeeded"])
        assert _skipped(night, job_id) == []
        assert _goes_on_after(night, job_id) == f"{newest.step}"


def _stopped_after_two(night: Night) -> tuple[str, list[Checkpoint]]:
    """A job that failed for good at step 12, with the checkpoints of steps 10 and 5; retried, it is well."""
    night.worker()
    once = night.settings.home / "once"
    job_id = night.db.submit(steps=20, checkpoint_every=5, at={"12": "diverge"}, once=str(once))
    night.db.until(job_id, "failed")
    kept = night.checkpoints(job_id)
    assert [checkpoint.step for checkpoint in kept] == [10, 5]
    return job_id, kept


def _file(night: Night, checkpoint: Checkpoint) -> Path:
    return night.db.files.folder / checkpoint.path


def _skipped(night: Night, job_id: str) -> list[int]:
    said = [event.data for event in night.db.events(job_id) if event.type == "warning"]
    return [data["step"] for data in said if data["code"] == "checkpoint_skipped"]


def _goes_on_after(night: Night, job_id: str) -> str | None:
    """The step, as the engine printed it."""
    printed = night.db.files.log_path(job_id, 2).read_text()
    _, found, rest = printed.partition("goes on after step ")
    return rest.split()[0] if found else None
