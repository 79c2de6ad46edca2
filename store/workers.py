"""Who works here, as each last said. Nothing depends on these rows: they are for people to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, select

from store import tables
from store.clock import database_now
from store.conflict import insert
from store.rows import as_record, columns


@dataclass(frozen=True)
class Worker:
    id: str
    host: str
    devices: list[Any]
    current_job: str | None
    started_at: float
    seen_at: float


WORKER = columns(tables.workers, Worker)


def beat(connection: Connection, worker_id: str, host: str, devices: Sequence[Any], current_job: str | None) -> None:
    """Say that a worker lives, and what it is at."""
    row = {"id": worker_id, "host": host, "devices": devices, "current_job": current_job}
    adding = insert(connection, tables.workers).values(**row, started_at=database_now(), seen_at=database_now())
    said = {"devices": devices, "current_job": current_job, "seen_at": database_now()}
    connection.execute(adding.on_conflict_do_update(index_elements=["id"], set_=said))


def leave(connection: Connection, worker_id: str) -> None:
    """A worker that stops says so; one that was killed is seen no more."""
    connection.execute(delete(tables.workers).where(tables.workers.c.id == worker_id))


def list(connection: Connection, seen_within_s: float | None = None) -> Sequence[Worker]:
    """Workers, the longest serving first; with a limit, only those that were seen since."""
    wanted = select(*WORKER).order_by(tables.workers.c.started_at, tables.workers.c.id)
    if seen_within_s is not None:
        wanted = wanted.where(tables.workers.c.seen_at >= database_now() - seen_within_s)
    return [as_record(Worker, row) for row in connection.execute(wanted)]
