from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from base import failpoints
from store.settings import Settings
from tests.worker.table import OPTIONS, Table
from worker.devices import Device
from worker.service import Worker

CPU = Device("cpu", "", 1)
QUICK = {"lease_s": 8, "heartbeat_s": 0.2, "look_s": 0.1, "rering_s": 0.5, "stop_grace_s": 2, "min_free_bytes": 0}


@pytest.fixture
def settings(sqlite_database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=sqlite_database_url, slots=1, **QUICK)


@pytest.fixture
def short_lease(settings: Settings) -> Settings:
    """For tests that let it lapse; the others have one that a busy machine does not cost them."""
    return settings.model_copy(update={"lease_s": 2.0})


@pytest.fixture
def table(settings: Settings) -> Iterator[Table]:
    table = Table(settings)
    yield table
    table.database.dispose()


@pytest.fixture
def start_worker(settings: Settings) -> Iterator[Callable[..., Worker]]:
    """Workers in this process, that look and do not listen unless told to; stopped at the end."""
    with ExitStack() as stack:

        def start(settings: Settings = settings, *, listens: bool = False, slots: int = 1) -> Worker:
            worker = Worker(settings, OPTIONS, listens=listens, devices=[CPU] * slots)
            stack.callback(worker.stop)
            worker.start()
            return worker

        yield start


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Force moments of this process, as `DISTILLERY_FAILPOINTS` would; none is left armed."""
    yield failpoints.arm
    failpoints.arm("")
