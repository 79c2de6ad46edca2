"""Alerts: conditions of which a job notifies while it runs, each once, whichever attempt meets it.

A metric is looked at when its point is written, by the attempt that writes it. Progress is looked at by the sweeps of
servers and workers: a job whose worker is gone makes none either. Each alert has a row, which is marked in the
transaction of its event.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update

from store.attempts import lock_owned_job, owned_by
from store.errors import LeaseLost
from store.events import append_event, update_job
from store.records import Job, database_now
from store.tables import job_alerts, jobs

TRIAL = "student"
"""The trial whose metrics are looked at."""


def asked(resolved_spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the alerts of a resolved spec; those of earlier versions have none."""
    alerts: list[dict[str, Any]] = resolved_spec.get("scheduling", {}).get("alerts", [])
    return alerts


def write(connection: Connection, job: Job) -> None:
    """Write the rows of a job's alerts, when it is submitted."""
    for number, alert in enumerate(asked(job.resolved_spec)):
        row = {"job_id": job.id, "number": number, "no_progress_s": alert["no_progress_s"]}
        connection.execute(insert(job_alerts).values(**row))


def reset(connection: Connection, job_id: str) -> None:
    """Let each alert be raised again: the job starts from scratch."""
    connection.execute(update(job_alerts).where(job_alerts.c.job_id == job_id).values(raised_at=None))


def see_metrics(
    connection: Connection,
    job_id: str,
    fence: int,
    alerts: Sequence[Mapping[str, Any]],
    *,
    step: int,
    epoch: float | None,
    values: Mapping[str, float | None],
) -> None:
    """Raise the alerts that the values of a point ask for. Raises LeaseLost if another attempt owns the job."""
    due = {}
    for number, alert in enumerate(alerts):
        value = values.get(alert["metric"]) if alert["metric"] is not None else None
        if value is None or (epoch or 0) < (alert["from_epoch"] or 1):
            continue
        bound = "below" if alert["below"] is not None else "above"
        if (value < alert["below"]) if bound == "below" else (value > alert["above"]):
            found = {"metric": alert["metric"], bound: alert[bound], "value": value, "epoch": epoch, "step": step}
            due[number] = found
    if not due:
        return
    # Locked before the rows of its alerts are read: what is raised below has the next number of its events.
    lock_owned_job(connection, job_id, fence)
    for number in sorted(due.keys() & _not_raised(connection, job_id)):
        job = update_job(connection, owned_by(job_id, fence))
        if job is None:
            raise LeaseLost(job_id, fence)
        _raise(connection, job, number, due[number])


def see_progress(connection: Connection) -> None:
    """Raise the alerts of running jobs that have made no progress for long. Any number of sweeps may run at once."""
    # The first condition is implied by the second; it lets the databases use the partial index.
    running = and_(jobs.c.status.in_(("queued", "running")), jobs.c.status == "running")
    ids = connection.scalars(select(jobs.c.id).where(running).order_by(jobs.c.id)).all()
    late = jobs.c.progressed_at < database_now() - job_alerts.c.no_progress_s
    due = and_(job_alerts.c.job_id.in_(ids), job_alerts.c.raised_at.is_(None), late)
    found = select(job_alerts.c.job_id, job_alerts.c.number, job_alerts.c.no_progress_s)
    joined = found.join_from(job_alerts, jobs, jobs.c.id == job_alerts.c.job_id).where(due)
    rows = connection.execute(joined.order_by(job_alerts.c.job_id, job_alerts.c.number)).all() if ids else ()
    for row in rows:
        # The job may have gone on, and another sweep may have raised the alert: both are read again under the lock. A
        # row that is locked has to wait for the next sweep, which has locked others already.
        still = and_(jobs.c.id == row.job_id, jobs.c.status == "running")
        locked = select(jobs.c.progressed_at, database_now()).where(still)
        locked = locked.with_for_update(key_share=True, skip_locked=True)
        job_now = connection.execute(locked).one_or_none()
        if job_now is None or row.number not in _not_raised(connection, row.job_id):
            continue
        progressed_at, now = job_now
        if progressed_at is None or now - progressed_at <= row.no_progress_s:
            continue
        job = update_job(connection, still)
        assert job is not None, "the row is locked"  # noqa: S101
        silent_s = round(now - progressed_at, 1)
        _raise(connection, job, row.number, {"no_progress_s": row.no_progress_s, "seconds": silent_s})


def _not_raised(connection: Connection, job_id: str) -> set[int]:
    open_rows = select(job_alerts.c.number).where(job_alerts.c.job_id == job_id, job_alerts.c.raised_at.is_(None))
    return set(connection.scalars(open_rows))


def _raise(connection: Connection, job: Job, number: int, found: Mapping[str, Any]) -> None:
    its = and_(job_alerts.c.job_id == job.id, job_alerts.c.number == number)
    connection.execute(update(job_alerts).where(its).values(raised_at=database_now()))
    append_event(connection, job, "alert", number=number, **found)
