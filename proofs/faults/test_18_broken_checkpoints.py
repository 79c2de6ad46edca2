"""Row 18: the newest checkpoint differs from its row. It is skipped with a warning, and the one before is used."""

from collections.abc import Callable
from pathlib import Path

import pytest

from proofs.faults.workers import LONG_LEASE, Workers
from store import jobs
from store.checkpoints import Checkpoint


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
    """A complete checkpoint with the name of this one."""
    path.write_text('{"step": 9, "weights": "of a stale attempt"}')


@pytest.mark.parametrize("harm", [cut_short, one_bit_flipped, emptied, gone, of_another_attempt])
def test_broken_checkpoint_is_skipped_and_the_one_before_is_used(
    tmp_path: Path, sqlite_database_url: str, harm: Callable[[Path], None]
):
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        job_id, (newest, before) = _failed_after_two(workers)
        harm(_file(workers, newest))
        workers.db.request(jobs.retry, job_id)
        workers.assert_succeeded(job_id, 20, ["failed", "succeeded"])
        assert _skipped(workers, job_id) == [newest.step]
        assert _resumed_after(workers, job_id) == f"{before.step}"
        workers.assert_nothing_left()


def test_broken_checkpoints_only_start_the_job_from_scratch(tmp_path: Path, sqlite_database_url: str):
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        job_id, (newest, before) = _failed_after_two(workers)
        emptied(_file(workers, newest))
        one_bit_flipped(_file(workers, before))
        workers.db.request(jobs.retry, job_id)
        workers.assert_succeeded(job_id, 20, ["failed", "succeeded"])
        assert _skipped(workers, job_id) == [newest.step, before.step]
        assert _resumed_after(workers, job_id) is None


def test_checkpoint_without_a_row_is_never_used(tmp_path: Path, sqlite_database_url: str):
    """A stale attempt may write a file under its own fence, but its row is refused."""
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        job_id, (newest, _) = _failed_after_two(workers)
        of_another_attempt(_file(workers, newest).with_name("000000019.pt"))
        workers.db.request(jobs.retry, job_id)
        workers.assert_succeeded(job_id, 20, ["failed", "succeeded"])
        assert _skipped(workers, job_id) == []
        assert _resumed_after(workers, job_id) == f"{newest.step}"


def _failed_after_two(workers: Workers) -> tuple[str, list[Checkpoint]]:
    """A job that failed at step 12, with the checkpoints of steps 10 and 5; a retry succeeds."""
    workers.start()
    once = workers.settings.home / "once"
    job_id = workers.db.submit(steps=20, checkpoint_every=5, at={"12": "diverge"}, once=str(once))
    workers.db.until(job_id, "failed")
    stored = workers.checkpoints(job_id)
    assert [checkpoint.step for checkpoint in stored] == [10, 5]
    return job_id, stored


def _file(workers: Workers, checkpoint: Checkpoint) -> Path:
    return workers.db.files.folder / checkpoint.path


def _skipped(workers: Workers, job_id: str) -> list[int]:
    warnings = [event.data for event in workers.db.events(job_id) if event.type == "warning"]
    return [data["step"] for data in warnings if data["code"] == "checkpoint_skipped"]


def _resumed_after(workers: Workers, job_id: str) -> str | None:
    """The step that the engine printed."""
    log = workers.db.files.log_path(job_id, 2).read_text()
    _, resumed, rest = log.partition("continues after step ")
    return rest.split()[0] if resumed else None
