"""Row 6: an engine ends in different ways at a chosen step. Each is named, and none leaves a process.

A segfault, SIGKILL, a MemoryError, exits without an error, and an engine that ignores SIGTERM:
`tests/worker/test_attempt.py`. Here are the ways that need a process or memory of their own.
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proofs.faults.workers import LONG_LEASE, Workers, family, until_gone
from tests.worker.job_database import REPOSITORY
from tests.worker.processes import FAKE_ENGINE, until

LARGE_JOB = {
    "dataset": "digits",
    "student": "resnet50_cifar",
    "method": "supervised",
    "training": {"epochs": 1, "batch_size": 1290},
}
IMPORTED = "import kdcore.run; print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
SPARE_BYTES = 600_000_000
"""Enough to start, but not for that network with this batch."""

LITTLE_BYTES = 200_000_000


CONTROL_GROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group, of either version, with LITTLE_BYTES of memory."""
    name = f"distillery-{secrets.token_hex(4)}"
    limits = [CONTROL_GROUPS / "memory" / name / "memory.limit_in_bytes", CONTROL_GROUPS / name / "memory.max"]
    limit = next(filter(_is_taken, limits), None)
    if limit is None:
        pytest.skip("this machine allows no control group of our own")
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


def test_engine_that_holds_the_interpreter_does_not_outlive_its_worker(tmp_path: Path, sqlite_database_url: str):
    """A thread in the engine could not watch the worker, because it would wait for that lock; the guard can."""
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        worker = workers.start_process()
        job_id = workers.db.submit(steps=20, checkpoint_every=2, at={"7": "hold_the_interpreter"})
        until(lambda: workers.db.job(job_id).checkpoint_step == 6, "the step where it takes the lock")
        training = family(worker.pid)[1:]
        worker.kill()
        until_gone(training)


def test_engine_without_enough_address_space_is_out_of_memory(tmp_path: Path, sqlite_database_url: str):
    """The real engine, with less address space than its network needs."""
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        # A build of torch for GPUs takes gigabytes of address space by its import alone.
        imported = int(subprocess.check_output([sys.executable, "-c", IMPORTED], cwd=REPOSITORY)) * 1024
        engine = ["prlimit", f"--as={imported + SPARE_BYTES}", sys.executable, "-m", "kdcore", "run"]
        workers.start_process(DISTILLERY_ENGINE=json.dumps(engine), DISTILLERY_WARM="false")
        job_id = workers.submit(LARGE_JOB, max_attempts=1)
        until(lambda: workers.db.job(job_id).status == "failed", "the engine to run out of memory", timeout_s=120)
        error = workers.db.job(job_id).error
        assert error["code"] == "out_of_memory", error
        assert "batch_size" in error["hint"]
        workers.assert_nothing_left()


def test_engine_killed_by_the_kernel_for_memory_is_out_of_memory(
    tmp_path: Path, sqlite_database_url: str, little_memory: Path
):
    """Only the engine is in the control group."""
    into = f'echo $$ > {little_memory}/cgroup.procs && exec "$@"'
    with Workers(tmp_path, sqlite_database_url, **LONG_LEASE) as workers:
        workers.start_process(DISTILLERY_ENGINE=json.dumps(["sh", "-c", into, "sh", *FAKE_ENGINE]))
        job_id = workers.db.submit(max_attempts=1, at={"7": "hoard"})
        job = workers.db.until(job_id, "failed")
        assert job.error["code"] == "out_of_memory", job.error
        assert "the kernel killed the engine" in job.error["message"]
        workers.assert_nothing_left()
