from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from base import failpoints
from store.settings import Settings
from tests.worker.job_database import OPTIONS, JobDatabase
from worker.context import WorkerContext
from worker.devices import Device
from worker.worker import Worker

CPU = Device("cpu", "", 1)
QUICK = {"lease_s": 8, "heartbeat_s": 0.2, "look_s": 0.1, "rering_s": 0.5, "stop_grace_s": 2, "min_free_bytes": 0}


@pytest.fixture
def settings(sqlite_database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=sqlite_database_url, slots=1, **QUICK)


@pytest.fixture
def short_lease(settings: Settings) -> Settings:
    """For tests in which a lease expires; in the others it is so long that none expires on a busy machine."""
    return settings.model_copy(update={"lease_s": 2.0})


@pytest.fixture
def db(settings: Settings) -> Iterator[JobDatabase]:
    db = JobDatabase(settings)
    yield db
    db.database.dispose()


@pytest.fixture
def context(settings: Settings) -> Iterator[WorkerContext]:
    context = WorkerContext(settings, OPTIONS, wake_workers=lambda: None)
    yield context
    context.close()


@pytest.fixture
def start_worker(settings: Settings) -> Iterator[Callable[..., Worker]]:
    """Start workers in this process; with `listens` they receive wake-up messages. Stopped at the end."""
    with ExitStack() as stack:

        def start(settings: Settings = settings, *, listens: bool = False, slots: int = 1) -> Worker:
            worker = Worker(settings, OPTIONS, listens=listens, devices=[CPU] * slots)
            stack.callback(worker.stop)
            worker.start()
            return worker

        yield start


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Arm failpoints of this process, as `DISTILLERY_FAILPOINTS` does; disarmed at the end."""
    yield failpoints.arm
    failpoints.arm("")
