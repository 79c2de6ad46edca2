"""Jobs in the state that a test needs, and how a test reads them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

from sqlalchemy import update

from base.warning import WarningItem
from store import events, jobs, lifecycle
from store.database import Database
from store.lifecycle import Claim
from store.records import Job, NewJob, database_now
from store.tables import jobs as job_rows

T = TypeVar("T")

SHA256 = "5" * 64
ERROR = {"code": "out_of_memory", "message": "the device is full", "retryable": True, "hint": None}
WARNING = WarningItem("checkpoint_not_kept", "", "the disk is full", "free some disk space")
LEASE_S = 30


def new_job(**changes: Any) -> NewJob:
    fields = {
        "project": "ours",
        "name": "a job",
        "kind": "distillation",
        "method": "kd",
        "spec": {"method": "kd"},
        "resolved_spec": {"method": {"name": "kd"}},
        "spec_sha256": SHA256,
        "idempotency_key": None,
        "created_by": None,
        "created_by_name": "local",
        "priority": 0,
        "max_attempts": 3,
        "deadline_s": None,
        "warnings": [],
        "labels": {},
        "summary": {},
    }
    return NewJob(**{**fields, **changes})


def submitted(database: Database, **changes: Any) -> Job:
    with database.begin() as connection:
        return jobs.submit(connection, new_job(**changes))[0]


def claimed(database: Database, *, owner: str = "worker", lease_s: float = LEASE_S, takeover: bool = False) -> Claim:
    with database.begin() as connection:
        claim = lifecycle.claim(connection, owner, lease_s, takeover=takeover)
    assert claim is not None
    return claim


def running(database: Database, **changes: Any) -> Claim:
    submitted(database, **changes)
    return claimed(database)


def expire_lease(database: Database, job_id: str) -> None:
    """Let the lease of one job expire. `clock.advance(LEASE_S + 1)` does it for all jobs."""
    with database.begin() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == job_id).values(lease_until=database_now() - 1))


def read_job(database: Database, job_id: str) -> Job:
    with database.connect() as connection:
        return jobs.get(connection, job_id)


def event_types(database: Database, job_id: str) -> list[str]:
    """Return the types of a job's events, after a check of their numbers."""
    with database.connect() as connection:
        rows = events.list_events(connection, job_id, 0, 10_000)
    assert [event.seq for event in rows] == list(range(1, len(rows) + 1))
    return [event.type for event in rows]


def run_concurrently(functions: list[Callable[[], T]]) -> list[T | Exception]:
    """Run functions in threads that start together. Returns each one's result, or the exception that it raised."""
    together = Barrier(len(functions))

    def run(function: Callable[[], T]) -> T | Exception:
        together.wait()
        try:
            return function()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))
