"""Where a job can go on from. A row names a file that was whole and durable before the row was written."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, delete, func, not_, or_, select, update

from store import tables
from store.clock import database_now
from store.conflict import insert
from store.errors import LeaseLost
from store.events import tell
from store.fence import change, mine
from store.rows import as_record, columns
from store.tables import jobs


@dataclass(frozen=True)
class Checkpoint:
    job_id: str
    fence: int
    """The attempt that wrote it: a stale one can only spoil its own."""
    step: int
    path: str
    """Relative to the blob store's folder."""
    sha256: str
    bytes: int


CHECKPOINT = columns(tables.checkpoints, Checkpoint)


def record(connection: Connection, job_id: str, fence: int, *, step: int, sha256: str, bytes: int, path: str) -> None:
    """Name a checkpoint that is whole on disk; from now on another attempt may go on from it."""
    furthest = func.coalesce(jobs.c.checkpoint_step, -1)
    job = change(connection, mine(job_id, fence), checkpoint_step=_larger(connection, furthest, step))
    if job is None:
        raise LeaseLost(job_id, fence)
    row = {"job_id": job_id, "fence": fence, "step": step, "path": path, "sha256": sha256, "bytes": bytes}
    adding = insert(connection, tables.checkpoints).values(**row, created_at=database_now())
    same = [tables.checkpoints.c.job_id, tables.checkpoints.c.fence, tables.checkpoints.c.step]
    connection.execute(adding.on_conflict_do_update(index_elements=same, set_=row))
    tell(connection, job, "checkpoint", step=step, bytes=bytes)


def newest(connection: Connection, job_id: str) -> list[Checkpoint]:
    """Every checkpoint, the furthest first; of one step, the latest attempt's first."""
    mine_all = select(*CHECKPOINT).where(tables.checkpoints.c.job_id == job_id)
    furthest_first = mine_all.order_by(tables.checkpoints.c.step.desc(), tables.checkpoints.c.fence.desc())
    return [as_record(Checkpoint, row) for row in connection.execute(furthest_first)]


def superseded(connection: Connection, job_id: str, keep: int = 2) -> list[Checkpoint]:
    """Forget all but the newest `keep`, and return the forgotten: their files may go once this is committed."""
    forgotten = newest(connection, job_id)[keep:]
    for checkpoint in forgotten:
        _forget(connection, checkpoint)
    return forgotten


def expired(connection: Connection, retain_s: float) -> list[str]:
    """Jobs that have checkpoints and will not go on from them: succeeded, or ended badly `retain_s` ago."""
    kept = select(tables.checkpoints.c.job_id)
    return list(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(kept), _done_with(retain_s))))


def expire(connection: Connection, job_id: str, retain_s: float) -> None:
    """Forget an ended job's checkpoints, unless it was queued again meanwhile: a retry then begins from scratch."""
    succeeded = jobs.c.status == "succeeded"
    steps = {name: case((succeeded, jobs.c[name])) for name in ("checkpoint_step", "claimed_step")}
    # Not by `change`: that would take an event's number, and there is nothing to tell.
    forgetting = update(jobs).where(jobs.c.id == job_id, _done_with(retain_s)).values(**steps).returning(jobs.c.id)
    if connection.execute(forgetting).one_or_none() is not None:
        connection.execute(delete(tables.checkpoints).where(tables.checkpoints.c.job_id == job_id))


def discard(connection: Connection, job_id: str, fence: int, broken: Checkpoint, reason: str) -> None:
    """Forget one whose bytes are not what its row says, and tell the client that an earlier one is used.

    The job goes on from what is left, and what gets further than that is progress.
    """
    others = and_(tables.checkpoints.c.job_id == job_id, not_(_is(broken)))
    furthest = select(func.max(tables.checkpoints.c.step)).where(others).scalar_subquery()
    job = change(connection, mine(job_id, fence), checkpoint_step=furthest, claimed_step=furthest)
    if job is None:
        raise LeaseLost(job_id, fence)
    _forget(connection, broken)
    tell(connection, job, "warning", code="checkpoint_skipped", message=reason, step=broken.step)


def _forget(connection: Connection, checkpoint: Checkpoint) -> None:
    connection.execute(delete(tables.checkpoints).where(_is(checkpoint)))


def _is(checkpoint: Checkpoint) -> ColumnElement[bool]:
    rows = tables.checkpoints.c
    return and_(rows.job_id == checkpoint.job_id, rows.fence == checkpoint.fence, rows.step == checkpoint.step)


def _done_with(retain_s: float) -> ColumnElement[bool]:
    ended_badly = and_(jobs.c.status.in_(("failed", "cancelled")), jobs.c.finished_at <= database_now() - retain_s)
    return or_(jobs.c.status == "succeeded", ended_badly)


def _larger(connection: Connection, one: Any, other: int) -> Any:
    """The larger of two values in a row: each database has its own word for it."""
    return func.greatest(one, other) if connection.dialect.name == "postgresql" else func.max(one, other)
