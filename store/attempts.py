"""A job's attempts: one row for each claim. Their fence lets only the newest attempt write to the job.

`fence` is the fencing token: it increases with every claim. Each write of an attempt names its fence and is refused
once another attempt owns the job.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, insert, select, update

from store.errors import LeaseLost
from store.records import Job, as_record, columns, database_now
from store.tables import job_attempts, jobs


@dataclass(frozen=True)
class Attempt:
    """One row of `job_attempts`."""

    job_id: str
    fence: int
    attempts_without_progress: int
    owner: str
    device: str | None
    started_at: float
    ended_at: float | None
    how: str | None
    """succeeded, failed, cancelled, paused, released, or lost: its lease expired."""
    first_step: int | None
    last_step: int | None


ATTEMPT_COLUMNS = columns(job_attempts, Attempt)


def owned_by(job_id: str, fence: int) -> ColumnElement[bool]:
    """Return the condition of every write of an attempt: the job is running, and under this fence."""
    return and_(jobs.c.id == job_id, jobs.c.fence == fence, jobs.c.status == "running")


def is_owner(connection: Connection, job_id: str, fence: int) -> bool:
    """Return whether this attempt owns the job now. An attempt that has lost its job never gets it back."""
    return connection.execute(select(jobs.c.id).where(owned_by(job_id, fence))).one_or_none() is not None


def lock_owned_job(connection: Connection, job_id: str, fence: int) -> None:
    """Lock the job's row until the commit, so that no worker claims it before the writes that follow.

    Raises LeaseLost if another attempt owns the job.
    """
    owned = select(jobs.c.id).where(owned_by(job_id, fence)).with_for_update(key_share=True)
    if connection.execute(owned).one_or_none() is None:
        raise LeaseLost(job_id, fence)


def list_attempts(connection: Connection, job_id: str) -> Sequence[Attempt]:
    rows = select(*ATTEMPT_COLUMNS).where(job_attempts.c.job_id == job_id).order_by(job_attempts.c.fence)
    return [as_record(Attempt, row) for row in connection.execute(rows)]


def open_attempt(connection: Connection, job: Job, device: str | None) -> None:
    """Add the row of a job's new attempt. Called once by each claim."""
    connection.execute(
        insert(job_attempts).values(
            job_id=job.id,
            fence=job.fence,
            attempts_without_progress=job.attempts_without_progress,
            owner=job.owner,
            device=device,
            started_at=database_now(),
            first_step=job.checkpoint_step,
        )
    )


def close_attempt(connection: Connection, job: Job, how: str) -> bool:
    """End the job's open attempt. Returns False if there is none."""
    closed = (
        update(job_attempts)
        .where(job_attempts.c.job_id == job.id, job_attempts.c.ended_at.is_(None))
        .values(ended_at=database_now(), how=how, last_step=job.checkpoint_step)
        .returning(job_attempts.c.fence)
    )
    return connection.execute(closed).first() is not None


def begin_batch(connection: Connection, job_id: str, fence: int, batch: int) -> bool:
    """Begin an attempt's transaction number `batch` (1, 2, …) of buffered writes.

    Returns False if this batch is committed already: then only the answer to its commit was lost.
    """
    # Lock the job first, as a claim does: another order could cause a deadlock with it.
    connection.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update(key_share=True))
    attempt = and_(job_attempts.c.job_id == job_id, job_attempts.c.fence == fence)
    numbered = update(job_attempts).where(attempt, job_attempts.c.batch < batch).values(batch=batch)
    if connection.execute(numbered.returning(job_attempts.c.batch)).first() is not None:
        return True
    if connection.execute(select(job_attempts.c.batch).where(attempt)).first() is None:
        raise LeaseLost(job_id, fence)
    return False
