"""Jobs brought to the point of their lives that a test is about."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

from sqlalchemy import update

from store import events, jobs, lifecycle
from store.clock import database_now
from store.database import Database
from store.jobs import Job
from store.lifecycle import Claim
from store.tables import jobs as job_rows

T = TypeVar("T")

SHA256 = "5" * 64
ERROR = {"code": "out_of_memory", "message": "the device is full", "retryable": True, "hint": None}


def submitted(database: Database, **changes: Any) -> Job:
    asked: dict[str, Any] = {
        "project": "ours",
        "spec": {"method": "kd"},
        "resolved": {"method": {"name": "kd"}},
        "name": "a job",
        "method": "kd",
        "spec_sha256": SHA256,
        "max_attempts": 3,
    }
    with database.begin() as connection:
        return jobs.submit(connection, **{**asked, **changes})[0]


def claimed(database: Database, *, owner: str = "worker", lease_s: float = 30, rescue: bool = False) -> Claim:
    with database.begin() as connection:
        claim = lifecycle.claim(connection, owner, lease_s, rescue=rescue)
    assert claim is not None
    return claim


def running(database: Database, **changes: Any) -> Claim:
    submitted(database, **changes)
    return claimed(database)


def lapse(database: Database, job_id: str) -> None:
    """The owner has been silent for longer than its lease."""
    with database.begin() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == job_id).values(lease_until=database_now() - 1))


def now(database: Database, job_id: str) -> Job:
    with database.connect() as connection:
        return jobs.get(connection, job_id)


def feed(database: Database, job_id: str) -> list[str]:
    """The types of a job's events; their numbers are checked on the way."""
    with database.connect() as connection:
        told = events.after(connection, job_id, 0, 10_000)
    assert [event.seq for event in told] == list(range(1, len(told) + 1))
    return [event.type for event in told]


def at_once(functions: list[Callable[[], T]]) -> list[T | Exception]:
    """Run functions side by side, started together; an exception stands for the answer that it replaced."""
    together = Barrier(len(functions))

    def run(function: Callable[[], T]) -> T | Exception:
        together.wait()
        try:
            return function()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))
