"""Workers that start and die around one database, and what they leave."""

import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from store import artifacts, checkpoints, jobs, metrics
from store.checkpoints import Checkpoint
from store.settings import Settings
from tests.store.helpers import new_job
from tests.worker.job_database import OPTIONS, JobDatabase, until_at_work, worker_process
from tests.worker.processes import until
from worker.attempt import STALE_FENCE
from worker.devices import Device
from worker.worker import Worker

SHORT_LEASE = {"lease_s": 2, "heartbeat_s": 0.4, "look_s": 0.1, "rering_s": 0.5, "stop_grace_s": 3, "min_free_bytes": 0}
"""For tests in which a lease expires."""
LONG_LEASE = {**SHORT_LEASE, "lease_s": 60}
"""For tests in which no lease may expire, also on a busy machine."""


class Workers:
    """One database and its workers. Everything that is started here has ended at the end of the `with` block."""

    def __init__(self, folder: Path, database_url: str, **settings: Any) -> None:
        self.settings = Settings(home=folder / "home", database_url=database_url, slots=1, **settings)
        self.db = JobDatabase(self.settings)
        self._folder, self._log = folder, folder / "worker.log"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.callback(self.db.database.dispose)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def log(self) -> str:
        """The log of all worker processes."""
        return self._log.read_text()

    def submit(self, spec: dict[str, Any], max_attempts: int = 3) -> str:
        """Submit a job for the real engine."""
        new = new_job(project="p", method=spec["method"], spec=spec, resolved_spec=spec, max_attempts=max_attempts)
        with self.db.database.begin() as connection:
            return jobs.submit(connection, new)[0].id

    def start_process(self, failpoints: str = "", **more: str) -> subprocess.Popen[bytes]:
        """Start `python -m worker`, with failpoints."""
        armed = {"DISTILLERY_FAILPOINTS": failpoints}
        return self._stack.enter_context(worker_process(self.settings, self._log, **armed, **more))

    def run_until_killed(self, failpoints: str) -> None:
        """Run a worker process until a failpoint kills it."""
        with worker_process(self.settings, self._log, DISTILLERY_FAILPOINTS=failpoints) as worker:
            assert worker.wait(60) == -signal.SIGKILL, self.log

    def start(self, **changes: Any) -> Worker:
        """Start a worker in this process that polls and does not listen."""
        worker = Worker(
            self.settings.model_copy(update=changes), OPTIONS, listens=False, devices=[Device("cpu", "", 1)]
        )
        self._stack.callback(worker.stop)
        worker.start()
        return worker

    def until_at_work(self) -> None:
        until_at_work(self._log)

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with self.db.database.connect() as connection:
            return checkpoints.list_checkpoints(connection, job_id)

    def until_step(self, job_id: str, step: int) -> None:
        until(lambda: (self.db.job(job_id).progress or {}).get("step") == step, f"step {step} of {job_id}")

    def until_taken_over(self, job_id: str) -> None:
        """Wait until the second attempt trains."""
        until(
            lambda: (job := self.db.job(job_id)).fence == 2 and job.phase == "training", "another worker to take over"
        )

    def until_refused(self, job_id: str) -> None:
        """Wait until the first attempt has woken and its write was refused, while the second one runs."""
        until(lambda: STALE_FENCE % (job_id, 1) in self.log, "the first attempt to be refused")
        job = self.db.job(job_id)
        assert (job.status, job.fence) == ("running", 2)

    def snapshot(self, job_id: str) -> dict[str, Any]:
        """All rows about a job that has ended."""
        with self.db.database.connect() as connection:
            published = artifacts.list_artifacts(connection, job_id)
            curves = metrics.series(connection, job_id, max_points=10**6)
        return {
            "job": asdict(self.db.job(job_id)),
            "events": self.db.events(job_id),
            "attempts": self.db.attempts(job_id),
            "checkpoints": self.checkpoints(job_id),
            "artifacts": published,
            "curves": curves,
        }

    def assert_succeeded(self, job_id: str, steps: int, hows: Iterable[str]) -> None:
        """It succeeded once, with the weights of an undisturbed run and each step once; its attempts ended so."""
        self.db.assert_trained(job_id, steps)
        rows = self.snapshot(job_id)
        assert [attempt.how for attempt in rows["attempts"]] == [*hows]
        assert rows["curves"]["student"]["train/loss"] == [(step, 1 / step) for step in range(1, steps + 1)]

    def assert_nothing_left(self) -> None:
        """No process, folder, lock or temporary file is left."""
        for path in self.db.files.temporaries(older_than_s=0):
            path.unlink(missing_ok=True)
        self.db.assert_nothing_left()
        until(lambda: not list(self._folder.glob("*/scratch/*")), "the scratch folders of all hosts to go")


def family(process: int) -> list[int]:
    """A process and its descendants, parents first."""
    family = [process]
    for one in family:
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            family += map(int, path.read_text().split())
    return family


@contextmanager
def frozen(db: JobDatabase, processes: Iterable[int]) -> Iterator[None]:
    """Freeze processes, but not during a write to SQLite, which would lock out all others."""
    stopped = list(processes)
    with db.database.begin():
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        # The signal takes a moment: a thread that still runs could begin a write once ours has ended.
        until(lambda: all(map(is_stopped, stopped)), "the processes to stop")
    try:
        yield
    finally:
        for process in filter(lambda one: Path(f"/proc/{one}").exists(), stopped):
            os.kill(process, signal.SIGCONT)


def is_stopped(process: int) -> bool:
    """Return True if no thread of the process runs."""
    states = [
        (task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{process}/task").iterdir()
    ]
    return all(state in "TtZX" for state in states)


def alive(process: int) -> bool:
    """Return True if the process has not ended. A zombie has ended, but is not reaped yet."""
    try:
        _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    except OSError:
        return False
    return rest.split()[0] not in "ZX"


def until_gone(processes: Iterable[int]) -> None:
    until(lambda: not any(map(alive, processes)), f"the end of the processes {list(processes)}")
