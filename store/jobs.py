"""Jobs as a client sees them: send, find, steer. What workers do is in `lifecycle`, why one waits in `waiting`."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, func, or_, select
from sqlalchemy import delete as delete_from

from base.failpoints import failpoint
from base.jobs import TERMINAL, allowed_actions
from store.clock import database_now
from store.conflict import insert
from store.errors import ActionNotAllowed, IdempotencyConflict, NotFound
from store.events import tell
from store.fence import change
from store.ids import new_id
from store.lifecycle import LET_GO
from store.rows import JOB, Job, as_record
from store.tables import checkpoints, jobs, metrics

__all__ = [
    "Job",
    "by_status",
    "cancel",
    "delete",
    "get",
    "list_page",
    "pause",
    "resume",
    "retry",
    "sent_before",
    "submit",
]

_LED_BY = {"cancelled": "cancel", "paused": "pause"}
"""What a client asked for, by the status that it ends in."""

# Built once: to build it costs more than to run it, and nothing is asked for as often.
_BY_ID = select(*JOB).where(jobs.c.id == bindparam("job_id"))


def submit(
    connection: Connection,
    *,
    project: str,
    spec: dict[str, Any],
    resolved: dict[str, Any],
    name: str | None,
    method: str,
    spec_sha256: str,
    max_attempts: int,
    idempotency_key: str | None = None,
    priority: int = 0,
    deadline_s: float | None = None,
) -> tuple[Job, bool]:
    """Queue a job. The same key with the same body is the same job, and False: it was there already.

    Raises IdempotencyConflict where the key came with another body. Racing senders of one key get one job.
    """
    new = insert(connection, jobs).values(
        id=new_id("job"),
        project=project,
        name=name,
        method=method,
        spec=spec,
        resolved_spec=resolved,
        spec_sha256=spec_sha256,
        idempotency_key=idempotency_key,
        status="queued",
        priority=priority,
        max_attempts=max_attempts,
        event_seq=1,
        created_at=database_now(),
        deadline_s=deadline_s,
        deadline_at=None if deadline_s is None else database_now() + deadline_s,
    )
    once = new.on_conflict_do_nothing(index_elements=[jobs.c.project, jobs.c.idempotency_key]).returning(*JOB)
    row = connection.execute(once).one_or_none()
    if row is None:
        job = sent_before(connection, project, str(idempotency_key), spec_sha256)
        assert job is not None, "the insert met a row under this key"  # noqa: S101
        return job, False
    job = as_record(Job, row)
    tell(connection, job, "queued")
    failpoint("submit.before_commit")
    return job, True


def sent_before(connection: Connection, project: str, idempotency_key: str, spec_sha256: str) -> Job | None:
    """The job that came with this key, if any did. Raises IdempotencyConflict where it came with another body."""
    same_key = and_(jobs.c.project == project, jobs.c.idempotency_key == idempotency_key)
    row = connection.execute(select(jobs.c.id, jobs.c.spec_sha256).where(same_key)).one_or_none()
    if row is None:
        return None
    if row.spec_sha256 != spec_sha256:
        raise IdempotencyConflict(idempotency_key, row.id)
    return get(connection, row.id)


def get(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """A job by its id; with a project, only within it."""
    row = connection.execute(_BY_ID, {"job_id": job_id}).one_or_none()
    if row is None or project not in (None, row.project):
        raise NotFound("job", job_id)
    return as_record(Job, row)


def list_page(
    connection: Connection,
    *,
    project: str,
    limit: int,
    after: str | None = None,
    status: str | None = None,
    method: str | None = None,
) -> tuple[list[Job], str | None]:
    """Jobs, newest first, from behind the one named `after`; and the name to go on behind, or None at the end."""
    wanted = select(*JOB).where(jobs.c.project == project)
    if after is not None:
        wanted = wanted.where(jobs.c.id < after)
    if status is not None:
        wanted = wanted.where(jobs.c.status == status)
    if method is not None:
        wanted = wanted.where(jobs.c.method == method)
    rows = connection.execute(wanted.order_by(jobs.c.id.desc()).limit(limit + 1)).all()
    found = [as_record(Job, row) for row in rows[:limit]]
    return found, found[-1].id if len(rows) > limit else None


def by_status(connection: Connection, project: str | None = None) -> dict[str, int]:
    """How many jobs there are in each status that any job is in."""
    counted = select(jobs.c.status, func.count()).group_by(jobs.c.status)
    if project is not None:
        counted = counted.where(jobs.c.project == project)
    return {status: count for status, count in connection.execute(counted)}


def cancel(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """A waiting job is cancelled at once; a running one is asked. Asking twice is asking once, and answers the job."""
    waits = jobs.c.status.in_(("queued", "paused"))
    unasked = and_(jobs.c.status == "running", func.coalesce(jobs.c.requested, "") != "cancel")
    job = change(
        connection,
        and_(_is(job_id, project), or_(waits, unasked)),
        status=case((waits, "cancelled"), else_=jobs.c.status),
        requested=case((unasked, "cancel")),
        fence=jobs.c.fence + case((waits, 1), else_=0),
        finished_at=case((waits, database_now())),
    )
    if job is None:
        return _asked_already(connection, job_id, project, "cancel")
    tell(connection, job, "cancelled" if job.status == "cancelled" else "cancel_requested")
    return job


def pause(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """A queued job is paused at once; a running one is asked to save its state first. A request to cancel outweighs it.

    Asking twice is asking once, and answers the job.
    """
    waits = jobs.c.status == "queued"
    unasked = and_(jobs.c.status == "running", jobs.c.requested.is_(None))
    job = change(
        connection,
        and_(_is(job_id, project), or_(waits, unasked)),
        status=case((waits, "paused"), else_=jobs.c.status),
        requested=case((unasked, "pause")),
    )
    if job is None:
        return _asked_already(connection, job_id, project, "pause")
    tell(connection, job, "paused" if job.status == "paused" else "pause_requested")
    return job


def resume(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """Put a paused job back into the queue, where it stood by its age."""
    job = change(connection, and_(_is(job_id, project), jobs.c.status == "paused"), status="queued", not_before=None)
    if job is None:
        raise _not_lawful(connection, job_id, project, "resume")
    tell(connection, job, "resumed")
    return job


def retry(connection: Connection, job_id: str, project: str | None = None, *, from_scratch: bool = False) -> Job:
    """Queue a failed or cancelled job again, with all its attempts and as long a deadline.

    It goes on from its last checkpoint; or from scratch, and then its checkpoints and curves are forgotten. Their files
    are the collector's to remove.
    """
    ended_badly = jobs.c.status.in_(("failed", "cancelled"))
    again: dict[str, Any] = {
        "attempts_without_progress": 0,
        "error": None,
        "not_before": None,
        "finished_at": None,
        **LET_GO,
    }
    again["deadline_at"] = database_now() + jobs.c.deadline_s
    if from_scratch:
        again |= {"checkpoint_step": None, "claimed_step": None, "progress": None}
    job = change(connection, and_(_is(job_id, project), ended_badly), status="queued", **again)
    if job is None:
        raise _not_lawful(connection, job_id, project, "retry")
    if from_scratch:
        for rows in (checkpoints, metrics):
            connection.execute(delete_from(rows).where(rows.c.job_id == job_id))
    tell(connection, job, "retried", **{"from": "scratch" if from_scratch else "checkpoint"})
    return job


def delete(connection: Connection, job_id: str, project: str | None = None) -> None:
    """Forget a job that has ended, with everything that hangs on it. Its files are the caller's to remove."""
    gone = delete_from(jobs).where(_is(job_id, project), jobs.c.status.in_(TERMINAL)).returning(jobs.c.id)
    if connection.execute(gone).one_or_none() is None:
        raise _not_lawful(connection, job_id, project, "delete")


def _is(job_id: str, project: str | None) -> ColumnElement[bool]:
    return jobs.c.id == job_id if project is None else and_(jobs.c.id == job_id, jobs.c.project == project)


def _asked_already(connection: Connection, job_id: str, project: str | None, verb: str) -> Job:
    """The job, where it has been asked so or has done so: the first answer may have been lost."""
    job = get(connection, job_id, project)
    if verb in (job.requested, _LED_BY.get(job.status)):
        return job
    raise _refusal(job, verb)


def _not_lawful(connection: Connection, job_id: str, project: str | None, verb: str) -> ActionNotAllowed:
    return _refusal(get(connection, job_id, project), verb)


def _refusal(job: Job, verb: str) -> ActionNotAllowed:
    return ActionNotAllowed(job.status, job.requested, verb, allowed_actions(job.status, job.requested))
