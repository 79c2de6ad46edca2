"""Why a queued job has not started. Worked out from the rows when asked, so that there is nothing to keep in step.

Only those that are due stand in the queue. A job that backs off has no place in it, and is before nobody.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, bindparam, func, select

from store import workers
from store.clock import database_now
from store.rows import Job
from store.tables import jobs
from store.workers import Worker

Reason = Literal["backing_off", "no_worker", "out_of_disk_space", "behind_others", "starting"]


@dataclass(frozen=True)
class Waiting:
    reason: Reason
    message: str
    until: float | None = None
    """Where the database's clock decides: seconds since 1970."""
    position: int | None = None
    """1 is next."""


# Built once, and asked once for a whole page: to count for each job who is before it would read the queue each time.
_IN_TURN = (
    select(
        jobs.c.id,
        func.row_number().over(order_by=(jobs.c.priority.desc(), jobs.c.created_at, jobs.c.id)).label("position"),
    )
    .where(jobs.c.status == "queued", func.coalesce(jobs.c.not_before, jobs.c.created_at) <= database_now())
    .subquery("in_turn")
)
_POSITIONS = select(_IN_TURN.c.id, _IN_TURN.c.position).where(_IN_TURN.c.id.in_(bindparam("ids", expanding=True)))


def reasons(connection: Connection, found: Iterable[Job], lease_s: float) -> dict[str, Waiting]:
    """For each queued job among these, by its id; nothing is asked where none is."""
    queued = [job for job in found if job.status == "queued"]
    if not queued:
        return {}
    positions = {id: place for id, place in connection.execute(_POSITIONS, {"ids": [job.id for job in queued]})}
    here = workers.consuming(connection, lease_s)
    told = {job.id: _why(job, positions.get(job.id), here) for job in queued}
    return {id: waiting for id, waiting in told.items() if waiting is not None}


def _why(job: Job, position: int | None, here: Sequence[Worker]) -> Waiting | None:
    if position is None:
        # Without a time to wait for, it has been claimed since its row was read.
        return None if job.not_before is None else Waiting("backing_off", _after_what(job), job.not_before)
    states = [device.state for worker in here for device in worker.devices]
    idle, busy = states.count("idle"), states.count("busy")
    if not here:
        told: tuple[Reason, str] = "no_worker", "no worker takes jobs now: start one, or look why those that are do not"
    elif all(any(device.state == "out_of_disk_space" for device in worker.devices) for worker in here):
        told = "out_of_disk_space", "every worker is short of disk space, and starts nothing before some is free"
    elif position > idle:
        told = "behind_others", f"{_counted(position - 1, 'job')} before it, {_counted(busy, 'slot')} busy"
    else:
        told = "starting", "a worker with an idle slot takes it within seconds"
    return Waiting(*told, position=position)


def _after_what(job: Job) -> str:
    ended = f"the last attempt ended with {job.error['code']}: {job.error['message']}; " if job.error else ""
    return f"{ended}the next one follows after a pause"


def _counted(number: int, what: str) -> str:
    return f"{number} {what} is" if number == 1 else f"{number} {what}s are"
