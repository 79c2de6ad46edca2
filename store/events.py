"""A job's events, numbered from 1. Polling, streaming and the web page read the same rows.

Every change of a job takes the next number in its own UPDATE (`update_job`) and then writes its event
(`append_event`). So a job's events have no gap, no duplicate number, and no event of an attempt that has lost the job.
The messages to webhooks are written with the event (`webhooks.announce`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, and_, bindparam, insert, select, update

from base.jobs import TERMINAL
from base.warning import WarningItem
from store import webhooks
from store.attempts import owned_by
from store.errors import LeaseLost
from store.records import JOB_COLUMNS, Job, as_record, columns, database_now
from store.tables import job_events, jobs


@dataclass(frozen=True)
class Event:
    """One row of `job_events`."""

    seq: int
    at: float
    type: str
    data: dict[str, Any]


EVENT_COLUMNS = columns(job_events, Event)
# Built once: every open stream runs it several times a second.
_AFTER = (
    select(*EVENT_COLUMNS)
    .where(job_events.c.job_id == bindparam("job_id"), job_events.c.seq > bindparam("seq"))
    .order_by(job_events.c.seq)
    .limit(bindparam("limit", type_=Integer))
)
_NEWEST = select(jobs.c.id, jobs.c.event_seq).where(jobs.c.id.in_(bindparam("ids", expanding=True)))
IDS_AT_ONCE = 500
"""The ids in one query: SQLite takes a bounded number of parameters."""


def update_job(connection: Connection, where: ColumnElement[bool], **values: Any) -> Job | None:
    """Change a job and take its next event number in one conditional UPDATE. Returns None if the condition is false."""
    changed = update(jobs).where(where).values(event_seq=jobs.c.event_seq + 1, **values).returning(*JOB_COLUMNS)
    row = connection.execute(changed).one_or_none()
    return None if row is None else as_record(Job, row)


def append_event(connection: Connection, job: Job, type: str, **data: Any) -> None:
    """Write the event of a change, under the number that the change took. Called once after each `update_job`."""
    row = {"job_id": job.id, "seq": job.event_seq, "at": database_now(), "type": type, "data": data}
    connection.execute(insert(job_events).values(row))
    webhooks.announce(connection, job, type, data)


def append_warning(
    connection: Connection, job_id: str, fence: int, warning: WarningItem, more: Mapping[str, Any] | None = None
) -> None:
    """Add a warning to the job's list and to its events; `more` is added to the event only.

    A warning that is on the list already, because an earlier attempt or the API found it, adds nothing.
    """
    known = connection.execute(select(jobs.c.warnings).where(owned_by(job_id, fence))).scalar_one_or_none()
    if known is None:
        raise LeaseLost(job_id, fence)
    item = warning.as_dict()
    if item in known and not more:
        return
    job = update_job(connection, owned_by(job_id, fence), warnings=known if item in known else [*known, item])
    if job is None:
        raise LeaseLost(job_id, fence)
    append_event(connection, job, "warning", **item, **(more or {}))


def append_late_warning(connection: Connection, job_id: str, warning: WarningItem) -> None:
    """Add a warning to a job that has ended, unless it has it. Nothing happens if it is deleted, or was retried."""
    ended = and_(jobs.c.id == job_id, jobs.c.status.in_(TERMINAL))
    known = connection.execute(select(jobs.c.warnings).where(ended)).scalar_one_or_none()
    if known is None or (item := warning.as_dict()) in known:
        return
    job = update_job(connection, ended, warnings=[*known, item])
    if job is not None:
        append_event(connection, job, "warning", **item)


def append_finding(connection: Connection, job_id: str, fence: int, type: str, data: Mapping[str, Any]) -> None:
    """Write what an attempt has found out as an event that changes nothing else of its job."""
    job = update_job(connection, owned_by(job_id, fence))
    if job is None:
        raise LeaseLost(job_id, fence)
    append_event(connection, job, type, **data)


def newest_numbers(connection: Connection, job_ids: Sequence[str]) -> dict[str, int]:
    """Return the numbers of the newest events of these jobs. Jobs that are gone are left out."""
    found: dict[str, int] = {}
    for start in range(0, len(job_ids), IDS_AT_ONCE):
        some = job_ids[start : start + IDS_AT_ONCE]
        found |= {id: seq for id, seq in connection.execute(_NEWEST, {"ids": some})}
    return found


def list_events(connection: Connection, job_id: str, seq: int, limit: int) -> list[Event]:
    """Return the events after number `seq`, oldest first."""
    rows = connection.execute(_AFTER, {"job_id": job_id, "seq": seq, "limit": limit})
    return [as_record(Event, row) for row in rows]
