"""A job's feed: what happened to it, numbered from 1. Polling, streaming and the web page read the same rows."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Integer, bindparam, insert, select

from store.clock import database_now
from store.errors import LeaseLost, NotFound
from store.fence import change, mine
from store.rows import Job, as_record, columns
from store.tables import job_events, jobs


@dataclass(frozen=True)
class Event:
    seq: int
    at: float
    type: str
    data: dict[str, Any]


EVENT = columns(job_events, Event)
# Built once, since every open stream asks it several times a second.
_AFTER = (
    select(*EVENT)
    .where(job_events.c.job_id == bindparam("job_id"), job_events.c.seq > bindparam("seq"))
    .order_by(job_events.c.seq)
    .limit(bindparam("limit", type_=Integer))
)


def tell(connection: Connection, job: Job, type: str, **data: Any) -> None:
    """Write down what a change did, under the number that the change took. To be called once after each `change`."""
    row = {"job_id": job.id, "seq": job.event_seq, "at": database_now(), "type": type, "data": data}
    connection.execute(insert(job_events).values(row))


def append(connection: Connection, job_id: str, fence: int | None, type: str, data: dict[str, Any]) -> Event:
    """Add an event that changes nothing else (a warning, a note); with a fence, only while it owns the job."""
    job = change(connection, jobs.c.id == job_id if fence is None else mine(job_id, fence))
    if job is None:
        raise NotFound("job", job_id) if fence is None else LeaseLost(job_id, fence)
    tell(connection, job, type, **data)
    return after(connection, job_id, job.event_seq - 1, 1)[0]


def after(connection: Connection, job_id: str, seq: int, limit: int) -> list[Event]:
    """What came after event number `seq`, oldest first."""
    rows = connection.execute(_AFTER, {"job_id": job_id, "seq": seq, "limit": limit})
    return [as_record(Event, row) for row in rows]
