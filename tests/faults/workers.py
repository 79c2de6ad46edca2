"""Workers that come and go around one db, and what they left when they are gone."""

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
from tests.worker.processes import until
from tests.worker.job_database import OPTIONS, JobDatabase, worker_process
from worker.devices import Device
from worker.worker import Worker

QUICK = {"lease_s": 2, "heartbeat_s": 0.4, "look_s": 0.1, "rering_s": 0.5, "stop_grace_s": 3, "min_free_bytes": 0}
"""For tests that let a lease lapse."""
PATIENT = {**QUICK, "lease_s": 60}
"""For tests in which no lease may lapse, however busy the machine is."""


class Night:
    """A database, and the workers of one night. What is started here has ended when the `with` block is left."""

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
        """What all worker processes said."""
        return self._log.read_text()

    def submit(self, spec: dict[str, Any], max_attempts: int = 3) -> str:
        """A job for the real engine."""
        told = {"project": "p", "name": None, "method": spec["method"], "spec_sha256": "0" * 64}
        with self.db.database.begin() as connection:
            job, _ = jobs.submit(connection, spec=spec, resolved=spec, max_attempts=max_attempts, **told)
        return job.id

    def process(self, failpoints: str = "", **more: str) -> subprocess.Popen[bytes]:
        """`python -m worker`, with moments at which something happens to it."""
        armed = {"DISTILLERY_FAILPOINTS": failpoints}
        return self._stack.enter_context(worker_process(self.settings, self._log, **armed, **more))

    def killed_at(self, failpoints: str) -> None:
        """A worker process that lives until then."""
        with worker_process(self.settings, self._log, DISTILLERY_FAILPOINTS=failpoints) as worker:
            assert worker.wait(60) == -signal.SIGKILL, self.log

    def worker(self, **changes: Any) -> Worker:
        """One in this process, that looks and does not listen."""
        worker = Worker(
            self.settings.model_copy(update=changes), OPTIONS, listens=False, devices=[Device("cpu", "", 1)]
        )
        self._stack.callback(worker.stop)
        worker.start()
        return worker

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with self.db.database.connect() as connection:
            return checkpoints.newest(connection, job_id)

    def until_step(self, job_id: str, step: int) -> None:
        until(lambda: (self.db.job(job_id).progress or {}).get("step") == step, f"step {step} of {job_id}")

    def until_taken_over(self, job_id: str) -> None:
        """The second attempt trains."""
        until(lambda: (job := self.db.job(job_id)).fence == 2 and job.phase == "training", "another to take over")

    def until_turned_away(self, job_id: str) -> None:
        """The first attempt has woken, and sees that the second, which runs, has the job."""
        until(lambda: "fence 1 is stale, another attempt owns the job" in self.log, "the frozen one to see it is late")
        job = self.db.job(job_id)
        assert (job.status, job.fence) == ("running", 2)

    def all_about(self, job_id: str) -> dict[str, Any]:
        """All that the table says of a job that has ended."""
        with self.db.database.connect() as connection:
            published = artifacts.list(connection, job_id)
            curves = metrics.series(connection, job_id, max_points=10**6)
        return {
            "job": asdict(self.db.job(job_id)),
            "events": self.db.events(job_id),
            "attempts": self.db.attempts(job_id),
            "checkpoints": self.checkpoints(job_id),
            "artifacts": published,
            "curves": curves,
        }

    def assert_ended_well(self, job_id: str, steps: int, hows: Iterable[str]) -> None:
        """Succeeded once with the weights of an undisturbed run, each step told of once; its attempts ended so."""
        self.db.assert_trained(job_id, steps)
        told = self.all_about(job_id)
        assert [attempt.how for attempt in told["attempts"]] == [*hows]
        assert told["curves"]["student"]["train/loss"] == [(step, 1 / step) for step in range(1, steps + 1)]

    def assert_nothing_left(self) -> None:
        """Neither process, nor folder, nor lock, nor half a file, once the sweep of files has come by."""
        for path in self.db.files.temporaries(older_than_s=0):
            path.unlink(missing_ok=True)
        self.db.assert_nothing_left()
        until(lambda: not list(self._folder.glob("*/scratch/*")), "the scratch folders of all hosts to go")


def family(process: int) -> list[int]:
    """A process and all that descend from it, parents first."""
    found = [process]
    for one in found:
        for path in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, path.read_text().split())
    return found


@contextmanager
def frozen(db: JobDatabase, processes: Iterable[int]) -> Iterator[None]:
    """Processes stopped as they stand, but not in the middle of a write to SQLite: that would keep everybody out."""
    stopped = list(processes)
    with db.database.begin():
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in filter(lambda one: Path(f"/proc/{one}").exists(), stopped):
            os.kill(process, signal.SIGCONT)


def alive(process: int) -> bool:
    """A zombie has ended: it only waits to be counted."""
    try:
        _, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    except OSError:
        return False
    return rest.split()[0] not in "ZX"


def until_gone(processes: Iterable[int]) -> None:
    until(lambda: not any(map(alive, processes)), f"the end of the processes {list(processes)}")
