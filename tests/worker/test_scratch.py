"""The scratch folder of an attempt, and the double fault: a worker is killed while its guard is frozen.

Folders and locks by themselves: `tests/base/test_folders.py`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from base.folders import HOST
from store import jobs
from store.settings import Settings
from tests.store.helpers import expire_lease
from tests.worker.job_database import JobDatabase, engines, worker_process
from tests.worker.processes import in_session, none_left, until
from worker.scratch import AttemptId, attempts_in_use, kill_session, remove_dead, scratch_folder, write_session


def test_scratch_folder_is_named_after_its_attempt(tmp_path: Path):
    with scratch_folder(tmp_path, "job_1", 7) as own:
        assert own.path == tmp_path / f"job_1.7.{HOST}"
        assert attempts_in_use(tmp_path) == {AttemptId("job_1", 7): tmp_path / f"job_1.7.{HOST}.lock"}
        assert dead(tmp_path) == []


def dead(parent: Path) -> list[AttemptId]:
    requeued: list[AttemptId] = []
    remove_dead(parent, requeued.append)
    return requeued


@contextmanager
def in_a_session(program: str, *holding: int) -> Iterator[subprocess.Popen[str]]:
    """A process that leads a session and prints when it runs."""
    command = [sys.executable, "-c", f"print('here', flush=True)\n{program}"]
    with subprocess.Popen(
        command, start_new_session=True, pass_fds=holding, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        try:
            yield process
        finally:
            process.kill()


SLEEP = "import time; time.sleep(600)"
FORK = f"import os; os.fork(); {SLEEP}"


def test_kill_session_ends_the_engine_and_its_forks(tmp_path: Path):
    with scratch_folder(tmp_path, "job_1", 1) as own, in_a_session(FORK, own.lock) as engine:
        until(lambda: len(in_session(engine.pid)) == 2, "the engine and its fork")
        write_session(own, engine.pid)
        (lock,) = attempts_in_use(tmp_path).values()
        assert kill_session(lock)
        none_left(engine.pid)
        assert not kill_session(lock), "this process still holds the lock, but is not in that session"


def test_remove_dead_waits_for_the_last_fork_to_end(tmp_path: Path):
    """Worker and engine have ended and a data loader lives: the attempt does not count as dead yet."""
    with in_a_session(
        "import os, sys; sys.path.insert(0, os.getcwd()); from pathlib import Path\n"
        "from worker.scratch import scratch_folder\n"
        f"with scratch_folder(Path({str(tmp_path)!r}), 'job_1', 1):\n"
        "    if os.fork():\n"
        "        os._exit(9)\n"
        f"    {SLEEP}"
    ) as worker:
        worker.wait(60)
        assert len(in_session(worker.pid)) == 1
        assert dead(tmp_path) == []
        assert len(attempts_in_use(tmp_path)) == 1
        os.killpg(worker.pid, signal.SIGKILL)
        until(lambda: dead(tmp_path) == [AttemptId("job_1", 1)], "the lock to be free")


@pytest.mark.parametrize("content", ["", "  \n", "not a number", "1", "999999999"])
def test_kill_session_kills_no_process_that_does_not_hold_the_lock(tmp_path: Path, content: str):
    with scratch_folder(tmp_path, "job_1", 1), in_a_session(SLEEP) as innocent:
        (lock,) = attempts_in_use(tmp_path).values()
        lock.write_text(content or str(innocent.pid))
        assert not kill_session(lock)
        assert innocent.poll() is None


@contextmanager
def unguarded_engine(settings: Settings, db: JobDatabase, folder: Path) -> Iterator[str]:
    """Yields the job of an engine that hangs, whose guard is frozen and whose worker is dead."""
    job_id = db.submit(steps=10, checkpoint_every=2, at={"3": "deaf"}, once=str(folder / "once"))
    with worker_process(settings, folder / "first.log") as worker:
        db.until_checkpoint(job_id)
        until((folder / "once").exists, "the engine to hang")
        guard, engine = sorted(engines(settings.home))
        os.kill(guard, signal.SIGSTOP)
        worker.kill()
        worker.wait()
        assert engines(settings.home) == [guard, engine]
        expire_lease(db.database, job_id)
        yield job_id


def test_unguarded_engine_is_ended_before_the_next_attempt_begins(
    settings: Settings, short_lease: Settings, db: JobDatabase, tmp_path: Path
):
    """Its lock is held, so the lease decides when the job is claimed again."""
    log = tmp_path / "second.log"
    # With a short lease, a guard on a busy machine could end the engine before the test freezes it.
    with unguarded_engine(settings, db, tmp_path) as job_id, worker_process(short_lease, log):
        db.assert_trained(job_id, 10)
        assert [attempt.how for attempt in db.attempts(job_id)] == ["lost", "succeeded"]
        assert "outlived" in log.read_text()
        db.assert_nothing_left()


def test_unguarded_engine_of_a_cancelled_job_is_ended(
    settings: Settings, short_lease: Settings, db: JobDatabase, tmp_path: Path
):
    with unguarded_engine(settings, db, tmp_path) as job_id:
        db.request(jobs.cancel, job_id)
        with worker_process(short_lease, tmp_path / "second.log"):
            db.until(job_id, "cancelled")
            db.assert_nothing_left()
