"""The workers, as described in their last heartbeats, and the reasons why jobs wait. Jobs do not depend on these rows.

A worker proves for each slot that it takes jobs: an idle slot has polled the database lately; the heartbeat of a
busy slot has succeeded. A slot without that proof is stuck; a worker whose slots are all stuck takes no jobs.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, and_, bindparam, delete, func, literal_column, select

from base.jobs import Reason, SlotState
from store import limits, tables
from store.records import Job, ListedJob, database_now, upsert
from store.tables import jobs
from store.teachers import list_awaited, waits_for_teacher

RETAIN_S = 86_400.0
"""A worker that was killed stays listed for a day, so that a user sees that it is missing."""


@dataclass(frozen=True)
class Device:
    """One slot of a worker."""

    name: str
    job: str | None = None
    state: SlotState = "idle"
    """out_of_disk_space: the slot polls, but starts no job before some disk space is free."""
    seen_s: float = 0.0
    """Seconds between the slot's last proof and the worker's last heartbeat."""
    memory_bytes: int | None = None
    """Memory of the GPU or of the host; None if it is not known."""

    @property
    def kind(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.name.startswith("cuda") else "cpu"


@dataclass(frozen=True)
class Worker:
    id: str
    host: str
    devices: tuple[Device, ...]
    current_job: str | None
    started_at: float
    seen_at: float
    silent_s: float
    """Seconds since its last heartbeat."""

    def consumes(self, lease_s: float) -> bool:
        """Return whether it takes jobs: its last heartbeat is within a lease, and not all its slots are stuck."""
        return self.silent_s <= lease_s and any(device.state != "stuck" for device in self.devices)


def record_heartbeat(
    connection: Connection, worker_id: str, host: str, devices: Sequence[Mapping[str, Any]], current_job: str | None
) -> None:
    """Write a worker's row (`devices`: fields of `Device`), and delete the rows of workers without one for a day."""
    state = {"devices": [dict(device) for device in devices], "current_job": current_job, "seen_at": database_now()}
    added = upsert(connection, tables.workers).values(id=worker_id, host=host, started_at=database_now(), **state)
    connection.execute(added.on_conflict_do_update(index_elements=["id"], set_=state))
    connection.execute(delete(tables.workers).where(tables.workers.c.seen_at < database_now() - RETAIN_S))


def delete_worker(connection: Connection, worker_id: str) -> None:
    """Delete the row of a worker that stops."""
    connection.execute(delete(tables.workers).where(tables.workers.c.id == worker_id))


def list_workers(connection: Connection, project: str | None = None) -> Sequence[Worker]:
    """Return all workers, the longest running first. Those that do not respond are included for a day.

    With a project, the jobs of others are left out of them.
    """
    rows = select(tables.workers, (database_now() - tables.workers.c.seen_at).label("silent_s"))
    ordered = rows.order_by(tables.workers.c.started_at, tables.workers.c.id)
    found = [_worker(row) for row in connection.execute(ordered).mappings()]
    return found if project is None else _without_others(connection, found, project)


def _without_others(connection: Connection, workers: Sequence[Worker], project: str) -> list[Worker]:
    named = {worker.current_job for worker in workers} | {slot.job for worker in workers for slot in worker.devices}
    own = set(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(named - {None}), jobs.c.project == project)))
    return [
        replace(
            worker,
            current_job=worker.current_job if worker.current_job in own else None,
            devices=tuple(replace(slot, job=slot.job if slot.job in own else None) for slot in worker.devices),
        )
        for worker in workers
    ]


def list_consuming(connection: Connection, lease_s: float) -> Sequence[Worker]:
    """Return the workers that take jobs: now, or when their current one has ended."""
    return [worker for worker in list_workers(connection) if worker.consumes(lease_s)]


def _worker(row: Mapping[Any, Any]) -> Worker:
    devices = tuple(Device(**device) for device in row["devices"])
    return Worker(**{**row, "devices": devices})


@dataclass(frozen=True)
class Waiting:
    """The reason why a queued job has not started."""

    reason: Reason
    message: str
    until: float | None = None
    """When a job that backs off is due, in seconds since 1970 by the database's clock."""
    position: int | None = None
    """Its place among the jobs that are due; 1 is next. None for a job that is not due, or far behind."""
    jobs: tuple[str, ...] = ()
    """The jobs whose students it waits for."""


COUNTED = 1000
"""The places of the queue that are counted. A job behind them has none, so that no poll reads a long queue."""

# Built once, and run once for a whole page of jobs: it reads the beginning of the queue.
_OPEN: tuple[Any, ...] = literal_column("'queued'"), literal_column("'running'")
_IS_DUE = and_(
    # As the partial index has it, so that both databases use that.
    jobs.c.status.in_(_OPEN),
    jobs.c.status == "queued",
    func.coalesce(jobs.c.not_before, jobs.c.created_at) <= database_now(),
    ~waits_for_teacher(jobs),
)
_QUEUE = select(jobs.c.id).where(_IS_DUE).order_by(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id).limit(COUNTED)
_DUE = select(jobs.c.id).where(jobs.c.id.in_(bindparam("ids", expanding=True)), _IS_DUE)


def waiting_reasons(connection: Connection, page: Iterable[Job | ListedJob], lease_s: float) -> dict[str, Waiting]:
    """Return the reasons why the queued ones of these jobs wait, by id. Runs no query if none is queued."""
    queued = [job for job in page if job.status == "queued"]
    if not queued:
        return {}
    positions: dict[str, int | None] = {id: place for place, id in enumerate(connection.scalars(_QUEUE), 1)}
    rest = [job.id for job in queued if job.id not in positions]
    if rest and len(positions) == COUNTED:
        positions |= dict.fromkeys(connection.scalars(_DUE, {"ids": rest}))
    not_due = [id for id in rest if id not in positions]
    awaited = list_awaited(connection, not_due) if not_due else {}
    consuming_workers = list_consuming(connection, lease_s)
    waits = {
        job.id: _for_teacher(awaited[job.id]) if job.id in awaited else _waiting(job, positions, consuming_workers)
        for job in queued
    }
    found = {id: waiting for id, waiting in waits.items() if waiting is not None}
    for id in _held_by_their_project(connection, found.keys() & positions.keys()):
        message = "the project runs as many jobs as it may; it starts when one of them has ended"
        found[id] = Waiting("project_limit", message, position=positions[id])
    return found


def _held_by_their_project(connection: Connection, due: Collection[str]) -> Sequence[str]:
    """Return those of these jobs whose project has a limit of its own and runs as many as it may."""
    full = limits.full_projects(connection, None)
    if not full:
        return ()
    return connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(due), jobs.c.project.in_(full))).all()


def _waiting(job: Job | ListedJob, positions: Mapping[str, int | None], workers: Sequence[Worker]) -> Waiting | None:
    if job.id not in positions:
        # A job without `not_before` was claimed between the two queries.
        return None if job.not_before is None else Waiting("backing_off", _backs_off(job), job.not_before)
    position = positions[job.id]
    states = [device.state for worker in workers for device in worker.devices]
    idle, busy = states.count("idle"), states.count("busy")
    reason: Reason
    if not workers:
        reason, message = "no_worker", "no worker takes jobs now: start one, or check why the running ones do not"
    elif all(any(device.state == "out_of_disk_space" for device in worker.devices) for worker in workers):
        reason, message = (
            "out_of_disk_space",
            "every worker is out of disk space, and starts no job before some is free",
        )
    elif position is None:
        reason = "behind_others"
        message = f"more than {COUNTED:,} jobs are before it, {_counted(busy, 'slot')} busy"
    elif position > idle:
        reason = "behind_others"
        before = f"{_counted(position - 1, 'job')} before it, " if position > 1 else ""
        message = f"{before}{_counted(busy, 'slot')} busy"
    else:
        reason, message = "starting", "a worker with an idle slot will claim it within seconds"
    return Waiting(reason, message, position=position)


def _for_teacher(awaited: Sequence[tuple[str, str | None]]) -> Waiting:
    named = ", ".join(f"job {id}, which is {status}" for id, status in awaited)
    return Waiting("teacher", f"it waits for the student of {named}", jobs=tuple(id for id, _ in awaited))


def _backs_off(job: Job | ListedJob) -> str:
    error = f"the last attempt ended with {job.error['code']}: {job.error['message']}; " if job.error else ""
    return f"{error}the next one follows after a pause"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun} is" if number == 1 else f"{number} {noun}s are"
