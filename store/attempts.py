"""A job's attempts, one row a claim: who tried, on what device, from which step to which, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, and_, insert, select, update

from store.clock import database_now
from store.errors import LeaseLost
from store.rows import Job, as_record, columns
from store.tables import job_attempts, jobs


@dataclass(frozen=True)
class Attempt:
    job_id: str
    fence: int
    attempts_without_progress: int
    owner: str
    device: str | None
    started_at: float
    ended_at: float | None
    how: str | None
    """succeeded, failed, cancelled, paused, released, or lost: its owner fell silent."""
    first_step: int | None
    last_step: int | None


ATTEMPT = columns(job_attempts, Attempt)


def list(connection: Connection, job_id: str) -> Sequence[Attempt]:
    tried = select(*ATTEMPT).where(job_attempts.c.job_id == job_id).order_by(job_attempts.c.fence)
    return [as_record(Attempt, row) for row in connection.execute(tried)]


def open(connection: Connection, job: Job, owner: str, device: str | None) -> None:
    """To be called by a claim, once."""
    row = {
        "job_id": job.id,
        "fence": job.fence,
        "attempts_without_progress": job.attempts_without_progress,
        "owner": owner,
        "device": device,
    }
    starting = insert(job_attempts).values(**row, started_at=database_now(), first_step=job.checkpoint_step)
    connection.execute(starting)


def begin_batch(connection: Connection, job_id: str, fence: int, batch: int) -> bool:
    """Begin an attempt's next transaction of writes; they are numbered from 1, upwards.

    False where this one is in already: the answer to its commit was lost, and not the commit.
    """
    # The job's row first, as a claim does it, or the two could wait for each other.
    connection.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update(key_share=True))
    own = and_(job_attempts.c.job_id == job_id, job_attempts.c.fence == fence)
    numbering = update(job_attempts).where(own, job_attempts.c.batch < batch).values(batch=batch)
    if connection.execute(numbering.returning(job_attempts.c.batch)).first() is not None:
        return True
    if connection.execute(select(job_attempts.c.batch).where(own)).first() is None:
        raise LeaseLost(job_id, fence)
    return False


def close(connection: Connection, job: Job, how: str) -> bool:
    """End the attempt that is open, if one is."""
    closing = (
        update(job_attempts)
        .where(job_attempts.c.job_id == job.id, job_attempts.c.ended_at.is_(None))
        .values(ended_at=database_now(), how=how, last_step=job.checkpoint_step)
        .returning(job_attempts.c.fence)
    )
    return connection.execute(closing).first() is not None
