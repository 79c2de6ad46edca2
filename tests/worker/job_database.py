"""Jobs that a test puts into the database, and what it reads there without the code under test."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from store import artifacts, events, jobs
from store.attempts import Attempt, list_attempts
from store.database import Database
from store.file_store import FileStore
from store.records import Job
from store.settings import Settings
from tests.store.helpers import new_job
from tests.worker.fake_engine import weights_after
from tests.worker.processes import FAKE_ENGINE, until
from worker.context import Options

REPOSITORY = Path(__file__).parents[2]
OPTIONS = Options(engine=FAKE_ENGINE, back_off_s=0.05, room_wait_s=0.3)
ENDED = ("succeeded", "failed", "cancelled")


class JobDatabase:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings.database_url)
        self.files = FileStore(settings.files)

    def submit(
        self,
        max_attempts: int = 3,
        deadline_s: float | None = None,
        project: str = "p",
        resolved: Mapping[str, Any] | None = None,
        **fake: Any,
    ) -> str:
        spec = {"fake": fake, **(resolved or {})}
        new = new_job(project=project, resolved_spec=spec, max_attempts=max_attempts, deadline_s=deadline_s)
        with self.database.begin() as connection:
            job, _ = jobs.submit(connection, new)
        return job.id

    def request(self, action: Any, job_id: str) -> Job:
        """Do what a client may request: `jobs.cancel`, `jobs.pause`, `jobs.resume`, `jobs.retry`."""
        with self.database.begin() as connection:
            job: Job = action(connection, job_id, "p")
        return job

    def job(self, job_id: str) -> Job:
        with self.database.connect() as connection:
            return jobs.get(connection, job_id)

    def events(self, job_id: str) -> list[events.Event]:
        with self.database.connect() as connection:
            return events.list_events(connection, job_id, 0, 1000)

    def types(self, job_id: str) -> list[str]:
        return [event.type for event in self.events(job_id)]

    def attempts(self, job_id: str) -> list[Attempt]:
        with self.database.connect() as connection:
            return list(list_attempts(connection, job_id))

    def until(self, job_id: str, *statuses: str) -> Job:
        until(lambda: self.job(job_id).status in statuses, f"{job_id} to be {' or '.join(statuses)}")
        return self.job(job_id)

    def until_checkpoint(self, job_id: str) -> int:
        until(lambda: self.job(job_id).checkpoint_step, f"a checkpoint of {job_id}")
        return self.job(job_id).checkpoint_step or 0

    def assert_trained(self, job_id: str, steps: int) -> None:
        """Succeeded once, with the weights of an undisturbed run."""
        job = self.until(job_id, *ENDED)
        assert (job.status, job.error) == ("succeeded", None)
        assert job.result is not None and job.result["weights"] == weights_after(steps)
        assert self.types(job_id).count("succeeded") == 1
        with self.database.connect() as connection:
            student = artifacts.get(connection, job_id, "student.safetensors")
        content = self.files.path(student.sha256).read_bytes()
        assert content.decode() == weights_after(steps)
        assert hashlib.sha256(content).hexdigest() == student.sha256
        assert [event.seq for event in self.events(job_id)] == list(range(1, job.event_seq + 1))

    def assert_nothing_left(self) -> None:
        """No scratch folder, no half-written file, no process of an engine that was given this home."""
        scratch = self.settings.home / "scratch"
        until(lambda: not list(scratch.glob("*")), "the scratch folders to go")
        assert not list(self.files.folder.rglob("*.tmp"))
        until(lambda: not engines(self.settings.home), "the engines to end")


def engines(home: Path) -> list[int]:
    """Living processes that run a job of this home: its engines, their children, and their guards."""
    at_work = {session for _, session, folder in _of_home(home) if folder.startswith(f"{home}/scratch/")}
    return [process for process, session, _ in _of_home(home) if session in at_work]


def waiting_engines(home: Path) -> list[int]:
    """Living processes that wait for an order in this home: engines and their guards."""
    return sorted({process for process, _, _ in _of_home(home)} - set(engines(home)))


def _of_home(home: Path) -> list[tuple[int, int, str]]:
    """Process, session and working folder of all processes with the environment of an engine of this home."""
    processes = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0TMPDIR={home}/scratch\0".encode() in b"\0" + (path / "environ").read_bytes():
                processes.append((int(path.name), os.getsid(int(path.name)), str((path / "cwd").readlink())))
        except OSError:
            continue
    return processes


@contextmanager
def worker_process(settings: Settings, log: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m worker`, with its output in `log`."""
    variables = {
        f"DISTILLERY_{name.upper()}": str(value) for name, value in settings.model_dump(exclude_none=True).items()
    }
    environment = {
        **os.environ,
        **variables,
        "DISTILLERY_ENGINE": json.dumps(FAKE_ENGINE),
        "DISTILLERY_BACK_OFF_S": "0.05",
        "DISTILLERY_ROOM_WAIT_S": "0.3",
        **more,
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker"], env=environment, cwd=REPOSITORY, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def until_at_work(log: Path) -> None:
    """Wait for the line that a worker process logs when it has started."""
    until(lambda: "is at work" in log.read_text(), "the worker to start")
