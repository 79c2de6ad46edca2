"""Who may write to a job. Each write of an attempt names its fence, and is refused once another attempt has the job."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, select, update

from store.errors import LeaseLost
from store.rows import JOB, Job, as_record
from store.tables import jobs


def mine(job_id: str, fence: int) -> ColumnElement[bool]:
    """The job still runs, and under this fence."""
    return and_(jobs.c.id == job_id, jobs.c.fence == fence, jobs.c.status == "running")


def change(connection: Connection, where: ColumnElement[bool], **values: Any) -> Job | None:
    """One conditional UPDATE that also takes the job's next event number; None where the condition did not hold.

    The number comes from the row that was let through, so a feed has no gap, no repeat, and nothing of a stale attempt.
    """
    numbered = update(jobs).where(where).values(event_seq=jobs.c.event_seq + 1, **values).returning(*JOB)
    row = connection.execute(numbered).one_or_none()
    return None if row is None else as_record(Job, row)


def stands(connection: Connection, job_id: str, fence: int) -> bool:
    """Whether this attempt may write at this moment. Once it may not, it never may again."""
    return connection.execute(select(jobs.c.id).where(mine(job_id, fence))).one_or_none() is not None


def require(connection: Connection, job_id: str, fence: int) -> None:
    """Hold the row until commit, so that nobody can claim it between this look and the write that follows."""
    held = select(jobs.c.id).where(mine(job_id, fence)).with_for_update(key_share=True)
    if connection.execute(held).one_or_none() is None:
        raise LeaseLost(job_id, fence)
