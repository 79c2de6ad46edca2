"""Who works here, as each last said. No job depends on these rows: they tell people, and what waits, who would take it.

A worker proves by device that it consumes: an idle slot has looked at the table lately, a busy one's heartbeat got
through. A slot of which neither is true is stuck, and a worker of none but stuck slots is there and does not work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, delete, select

from store import tables
from store.clock import database_now
from store.conflict import insert

FORGOTTEN_S = 86_400.0
"""Whoever was killed is still shown for a day, so that it can be seen that it is missing."""


@dataclass(frozen=True)
class Device:
    """One slot of a worker, as its worker sees it."""

    name: str
    job: str | None = None
    state: Literal["idle", "busy", "out_of_disk_space", "stuck"] = "idle"
    """out_of_disk_space: it looks, and starts nothing, for want of disk space."""
    seen_s: float = 0.0
    """Seconds between the slot's last proof that it consumes and the worker's last word."""


@dataclass(frozen=True)
class Worker:
    id: str
    host: str
    devices: tuple[Device, ...]
    current_job: str | None
    started_at: float
    seen_at: float
    silent_s: float
    """Seconds since its last word."""

    def consumes(self, lease_s: float) -> bool:
        """Heard within a lease, and with a slot that is not stuck."""
        return self.silent_s <= lease_s and any(device.state != "stuck" for device in self.devices)


def beat(
    connection: Connection, worker_id: str, host: str, devices: Sequence[Mapping[str, Any]], current_job: str | None
) -> None:
    """Say that a worker lives, and what each of its slots is at: `Device` by field. Forgets those long unheard."""
    said = {"devices": [dict(device) for device in devices], "current_job": current_job, "seen_at": database_now()}
    adding = insert(connection, tables.workers).values(id=worker_id, host=host, started_at=database_now(), **said)
    connection.execute(adding.on_conflict_do_update(index_elements=["id"], set_=said))
    connection.execute(delete(tables.workers).where(tables.workers.c.seen_at < database_now() - FORGOTTEN_S))


def leave(connection: Connection, worker_id: str) -> None:
    """A worker that stops says so; one that was killed is seen no more."""
    connection.execute(delete(tables.workers).where(tables.workers.c.id == worker_id))


def list(connection: Connection) -> Sequence[Worker]:
    """Workers, the longest serving first; also the silent, for a day."""
    told = select(tables.workers, (database_now() - tables.workers.c.seen_at).label("silent_s"))
    ordered = told.order_by(tables.workers.c.started_at, tables.workers.c.id)
    return [_worker(row) for row in connection.execute(ordered).mappings()]


def consuming(connection: Connection, lease_s: float) -> Sequence[Worker]:
    """Those that would take a job now, or when the one at hand has ended."""
    return [worker for worker in list(connection) if worker.consumes(lease_s)]


def _worker(row: Mapping[Any, Any]) -> Worker:
    # Rows of before devices had states hold what has their defaults.
    devices = tuple(Device(**device) for device in row["devices"])
    return Worker(**{**row, "devices": devices})
