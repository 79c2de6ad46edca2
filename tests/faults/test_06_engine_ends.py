"""Row 6: an engine ends in a way of its own at a chosen step. Each way has its name, and none leaves a process behind.

A segfault, SIGKILL, a MemoryError, exits without a word, and deafness to SIGTERM: `tests/worker/test_run_job.py`, with
the last of the log in the feed. Here is what takes a process or memory of its own.
"""

import json
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.workers import PATIENT, Night, family, until_gone
from tests.worker.processes import FAKE_ENGINE, until

HUNGRY = {
    "dataset": "digits",
    "student": "resnet50_cifar",
    "method": "supervised",
    "training": {"epochs": 1, "batch_size": 1290},
}
ADDRESS_SPACE = 1_500_000_000
"""Bytes: enough for torch, and too few for that network on such a batch."""

LITTLE_BYTES = 200_000_000


CONTROL_GROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group, of either version, whose processes the kernel ends when they take more than that."""
    name = f"distillery-{secrets.token_hex(4)}"
    limits = [CONTROL_GROUPS / "memory" / name / "memory.limit_in_bytes", CONTROL_GROUPS / name / "memory.max"]
    limit = next(filter(_is_taken, limits), None)
    if limit is None:
        pytest.skip("this machine gives no control group of our own")
    yield limit.parent
    limit.parent.rmdir()


def _is_taken(limit: Path) -> bool:
    try:
        limit.parent.mkdir()
    except OSError:
        return False
    try:
        limit.write_text(str(LITTLE_BYTES))
    except OSError:
        limit.parent.rmdir()
        return False
    return True


def test_one_that_holds_the_interpreter_does_not_outlive_its_worker(tmp_path: Path, sqlite_database_url: str):
    """A thread of its own that watched for the worker's end would wait for the lock for ever; the guard does not."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        worker = night.process()
        job_id = night.db.submit(steps=20, checkpoint_every=2, at={"7": "hold_the_interpreter"})
        until(lambda: night.db.job(job_id).checkpoint_step == 6, "the step where it takes the lock")
        training = family(worker.pid)[1:]
        worker.kill()
        until_gone(training)


def test_memory_that_is_not_there_is_named(tmp_path: Path, sqlite_database_url: str):
    """The real engine, with less address space than its network needs."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        engine = ["prlimit", f"--as={ADDRESS_SPACE}", sys.executable, "-m", "kdcore", "run"]
        night.process(DISTILLERY_ENGINE=json.dumps(engine), DISTILLERY_WARM="false")
        job_id = night.submit(HUNGRY, max_attempts=1)
        until(lambda: night.db.job(job_id).status == "failed", "the engine to come so far", timeout_s=120)
        error = night.db.job(job_id).error
        assert error["code"] == "out_of_memory", error
        assert "batch_size" in error["hint"]
        night.assert_nothing_left()


def test_memory_that_the_kernel_takes_back_is_named(tmp_path: Path, sqlite_database_url: str, little_memory: Path):
    """The engine alone in a group of processes that may have little."""
    into = f'echo $$ > {little_memory}/cgroup.procs && exec "$@"'
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        night.process(DISTILLERY_ENGINE=json.dumps(["sh", "-c", into, "sh", *FAKE_ENGINE]))
        job_id = night.db.submit(max_attempts=1, at={"7": "hoard"})
        job = night.db.until(job_id, "failed")
        assert job.error["code"] == "out_of_memory", job.error
        assert "the kernel ended the engine" in job.error["message"]
        night.assert_nothing_left()
