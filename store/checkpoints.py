"""Checkpoints, from which a job can continue. Each row names a file that was complete and durable before the row."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, delete, func, not_, or_, select, update

from base.warning import WarningItem
from store import tables
from store.attempts import owned_by
from store.errors import LeaseLost
from store.events import append_event, append_warning, update_job
from store.records import as_record, columns, database_now, upsert
from store.tables import jobs


@dataclass(frozen=True)
class Checkpoint:
    """One row of `checkpoints`."""

    job_id: str
    fence: int
    """The attempt that wrote it. Each attempt has its own folder, so a stale one cannot damage the files of another."""
    step: int
    path: str
    """Relative to the file store's folder."""
    sha256: str
    bytes: int


CHECKPOINT_COLUMNS = columns(tables.checkpoints, Checkpoint)


def record(connection: Connection, job_id: str, fence: int, *, step: int, sha256: str, bytes: int, path: str) -> None:
    """Add a checkpoint whose file is complete on disk. From the commit on, a later attempt may continue from it."""
    furthest = func.coalesce(jobs.c.checkpoint_step, -1)
    job = update_job(connection, owned_by(job_id, fence), checkpoint_step=_larger(connection, furthest, step))
    if job is None:
        raise LeaseLost(job_id, fence)
    row = {"job_id": job_id, "fence": fence, "step": step, "path": path, "sha256": sha256, "bytes": bytes}
    added = upsert(connection, tables.checkpoints).values(**row, created_at=database_now())
    same = [tables.checkpoints.c.job_id, tables.checkpoints.c.fence, tables.checkpoints.c.step]
    connection.execute(added.on_conflict_do_update(index_elements=same, set_=row))
    append_event(connection, job, "checkpoint", step=step, bytes=bytes)


def list_checkpoints(connection: Connection, job_id: str) -> list[Checkpoint]:
    """Return the job's checkpoints, the furthest step first, and for equal steps the newest attempt first."""
    of_job = select(*CHECKPOINT_COLUMNS).where(tables.checkpoints.c.job_id == job_id)
    furthest_first = of_job.order_by(tables.checkpoints.c.step.desc(), tables.checkpoints.c.fence.desc())
    return [as_record(Checkpoint, row) for row in connection.execute(furthest_first)]


def delete_superseded(connection: Connection, job_id: str, keep: int) -> list[Checkpoint]:
    """Delete the rows of all but the newest `keep` checkpoints. Returns them: delete their files after the commit."""
    old = list_checkpoints(connection, job_id)[keep:]
    for checkpoint in old:
        connection.execute(delete(tables.checkpoints).where(_is(checkpoint)))
    return old


def delete_broken(connection: Connection, job_id: str, fence: int, broken: Checkpoint, reason: str) -> None:
    """Delete the row of a checkpoint whose file does not match its digest, and add a warning to the events.

    The job continues from the furthest remaining checkpoint; a step beyond that is progress.
    """
    others = and_(tables.checkpoints.c.job_id == job_id, not_(_is(broken)))
    furthest = select(func.max(tables.checkpoints.c.step)).where(others).scalar_subquery()
    changed = update(jobs).where(owned_by(job_id, fence)).values(checkpoint_step=furthest, claimed_step=furthest)
    if connection.execute(changed.returning(jobs.c.id)).one_or_none() is None:
        raise LeaseLost(job_id, fence)
    connection.execute(delete(tables.checkpoints).where(_is(broken)))
    hint = "the job continues from an earlier checkpoint; check the disk that holds the service's files"
    append_warning(
        connection, job_id, fence, WarningItem("checkpoint_skipped", "", reason, hint), {"step": broken.step}
    )


def list_expired(connection: Connection, retain_s: float) -> list[str]:
    """Return the jobs whose checkpoints can be deleted: they succeeded, or ended otherwise `retain_s` ago."""
    with_checkpoints = select(tables.checkpoints.c.job_id)
    return list(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(with_checkpoints), _is_expired(retain_s))))


def delete_expired(connection: Connection, job_id: str, retain_s: float) -> None:
    """Delete an ended job's checkpoints, unless it was queued again meanwhile. A later retry begins from scratch."""
    succeeded = jobs.c.status == "succeeded"
    steps = {name: case((succeeded, jobs.c[name])) for name in ("checkpoint_step", "claimed_step")}
    # Not `update_job`: this change has no event, so it must not take an event number.
    changed = update(jobs).where(jobs.c.id == job_id, _is_expired(retain_s)).values(**steps).returning(jobs.c.id)
    if connection.execute(changed).one_or_none() is not None:
        connection.execute(delete(tables.checkpoints).where(tables.checkpoints.c.job_id == job_id))


def _is(checkpoint: Checkpoint) -> ColumnElement[bool]:
    rows = tables.checkpoints.c
    return and_(rows.job_id == checkpoint.job_id, rows.fence == checkpoint.fence, rows.step == checkpoint.step)


def _is_expired(retain_s: float) -> ColumnElement[bool]:
    ended = and_(jobs.c.status.in_(("failed", "cancelled")), jobs.c.finished_at <= database_now() - retain_s)
    return or_(jobs.c.status == "succeeded", ended)


def _larger(connection: Connection, one: Any, other: int) -> Any:
    """Return the larger of two values of one row. The function's name differs between the databases."""
    return func.greatest(one, other) if connection.dialect.name == "postgresql" else func.max(one, other)
