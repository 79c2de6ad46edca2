"""Row 6: an engine ends in a way of its own at a chosen step. Each way has its name, and none leaves a process behind.

A segfault, SIGKILL, a MemoryError and exits without a word: `tests/worker/test_run_job.py`, tried again, with the last
of the log in the feed. Here is what only real memory or a deaf process can show.
"""

import json
import sys
from pathlib import Path

from store import jobs
from tests.faults.workers import PATIENT, Night, family, until_gone
from tests.worker.processes import until

HUNGRY = {
    "dataset": "digits",
    "student": "resnet50_cifar",
    "method": "supervised",
    "training": {"epochs": 1, "batch_size": 1290},
}
ADDRESS_SPACE = 1_500_000_000
"""Bytes: enough for torch, and too few for that network on such a batch."""


def test_one_that_holds_the_interpreter_is_killed_after_the_grace(tmp_path: Path, sqlite_database_url: str):
    """SIGTERM reaches it, and no handler ever runs."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        worker = night.process()
        job_id = night.table.submit(steps=20, checkpoint_every=2, at={"7": "hold_the_interpreter"})
        until(lambda: night.table.job(job_id).checkpoint_step == 6, "the step where it takes the lock")
        training = family(worker.pid)[1:]
        night.table.ask(jobs.cancel, job_id)
        night.table.until(job_id, "cancelled")
        until_gone(training)
        night.assert_nothing_left()


def test_one_that_holds_the_interpreter_does_not_outlive_its_worker(tmp_path: Path, sqlite_database_url: str):
    """A thread of its own that watched for the worker's end would wait for the lock for ever; the guard does not."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        worker = night.process()
        job_id = night.table.submit(steps=20, checkpoint_every=2, at={"7": "hold_the_interpreter"})
        until(lambda: night.table.job(job_id).checkpoint_step == 6, "the step where it takes the lock")
        training = family(worker.pid)[1:]
        worker.kill()
        until_gone(training)


def test_memory_that_is_not_there_is_named(tmp_path: Path, sqlite_database_url: str):
    """The real engine, with less address space than its network needs."""
    with Night(tmp_path, sqlite_database_url, **PATIENT) as night:
        engine = ["prlimit", f"--as={ADDRESS_SPACE}", sys.executable, "-m", "kdcore", "run"]
        night.process(DISTILLERY_ENGINE=json.dumps(engine))
        job_id = night.submit(HUNGRY, max_attempts=1)
        job = night.table.until(job_id, "failed")
        assert job.error["code"] == "out_of_memory", job.error
        assert "batch_size" in job.error["hint"]
        night.assert_nothing_left()
