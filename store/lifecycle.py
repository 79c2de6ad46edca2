"""The transitions that workers make. Each is one conditional UPDATE; if it returns no row, it was not allowed.

    queued ──claim──▶ running ──finish──▶ succeeded | failed | cancelled
     ▲  │                │ release                        │
     │  └──▶ paused ◀────┤                                │
     └──resume──┘        └──▶ queued ◀───────retry────────┘

A queued job that waits for its teacher (`teachers.py`) cannot be claimed. A job whose lease has expired can be claimed
directly. It is not reset before, so an owner that comes back first keeps its job. `fence` is the fencing token: it
increases with every claim, and the WHERE clause of every write checks it (`attempts.owned_by`), so a worker that has
lost its lease cannot change the job any more.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, FromClause, and_, bindparam, case, false, func, or_, select, update

from base.errors import DeadlineExceeded, WorkerLost
from base.wire import TeacherCheck
from store import alerts, limits, projects, registry
from store.artifacts import NewArtifact, publish
from store.attempts import close_attempt, open_attempt, owned_by
from store.checkpoints import Checkpoint, list_checkpoints
from store.errors import LeaseLost
from store.events import append_event, update_job
from store.lists import figures_of
from store.records import Job, database_now
from store.tables import jobs
from store.teachers import append_change, lock_with_waiting, waits_for_teacher

_NO_OWNER: dict[str, Any] = {"owner": None, "lease_until": None, "requested": None, "phase": None}
_DEADLINE_EXCEEDED = DeadlineExceeded(
    "the job did not end before its deadline",
    "retry it: it continues from its last checkpoint and gets as much time again",
).as_dict()
_WORKER_LOST = WorkerLost(
    "the worker stopped responding, and no attempt is left",
    "retry the job; if it happens again, read the log: the job may be killing its worker",
).as_dict()


@dataclass(frozen=True)
class Claim:
    """A job that this worker owns until the lease expires. It can continue from `checkpoints`, the newest first."""

    job: Job
    checkpoints: list[Checkpoint]

    @property
    def fence(self) -> int:
        return self.job.fence


def claim(
    connection: Connection,
    owner: str,
    lease_s: float,
    *,
    takeover: bool,
    device: str | None = None,
    max_running: int | None = None,
) -> Claim | None:
    """Claim the first job of the queue; with `takeover`, also one whose lease has expired. Returns None without a job.

    A worker may take over only after one lease of unbroken contact with the database. Otherwise the lease may have
    expired because the database was out of reach, for the owner as well.

    `max_running`: the jobs that a project without a limit of its own may run at a time. The queued jobs of a project
    that runs as many as it may are left out; those of others are not delayed by them.
    """
    limits.lock_claims(connection, max_running)
    full = limits.full_projects(connection, max_running)
    first = _first_claimable(takeover, full).with_for_update(skip_locked=True).scalar_subquery()
    job = update_job(
        connection,
        jobs.c.id == first,
        status="running",
        fence=jobs.c.fence + 1,
        attempts_without_progress=case((_made_progress(jobs), 1), else_=jobs.c.attempts_without_progress + 1),
        claimed_step=jobs.c.checkpoint_step,
        owner=owner,
        lease_until=database_now() + lease_s,
        started_at=func.coalesce(jobs.c.started_at, database_now()),
        not_before=None,
        progressed_at=database_now(),
        phase=None,
        # The error of the last attempt remains in the events.
        error=None,
    )
    if job is None:
        return None
    was_running = close_attempt(connection, job, "lost")
    open_attempt(connection, job, device)
    append_event(connection, job, "claimed", attempt=job.fence, worker=owner, device=device, takeover=was_running)
    return Claim(job, list_checkpoints(connection, job.id))


def has_claimable(connection: Connection, takeover: bool, max_running: int | None = None) -> bool:
    """Return whether a claim would find a job. Takes no lock, so polling is cheap."""
    full = limits.full_projects(connection, max_running)
    return connection.execute(_first_claimable(takeover, full)).one_or_none() is not None


def heartbeat(connection: Connection, job_id: str, fence: int, lease_s: float) -> str | None:
    """Extend the lease. Returns the action that a client has requested (`cancel`, `pause`), or None.

    Raises LeaseLost if another attempt owns the job; the caller must then stop its training at once.
    """
    extended = (
        update(jobs)
        .where(owned_by(job_id, fence))
        .values(lease_until=database_now() + lease_s)
        .returning(jobs.c.requested)
    )
    row = connection.execute(extended).one_or_none()
    if row is None:
        raise LeaseLost(job_id, fence)
    requested: str | None = row.requested
    return requested


def set_phase(connection: Connection, job_id: str, fence: int, to: str) -> None:
    job = update_job(connection, owned_by(job_id, fence), phase=to, progressed_at=database_now())
    if job is None:
        raise LeaseLost(job_id, fence)
    append_event(connection, job, "phase", phase=to)


def set_teacher_check(connection: Connection, job_id: str, fence: int, to: dict[str, Any], key: str | None) -> None:
    """Keep the check of the job's teacher: with the job, in its events, and under `key` for the project's later jobs.

    An attempt that repeats the check with the same result adds no event.
    """
    shown = {name: to[name] for name in TeacherCheck.__annotations__ if name in to}
    known = connection.execute(
        select(jobs.c.project, jobs.c.teacher_check).where(owned_by(job_id, fence))
    ).one_or_none()
    if known is None:
        raise LeaseLost(job_id, fence)
    if known.teacher_check != shown:
        job = update_job(connection, owned_by(job_id, fence), teacher_check=shown)
        if job is None:
            raise LeaseLost(job_id, fence)
        append_event(connection, job, "teacher_check", **shown)
    if key is not None:
        registry.put_measurement(connection, known.project, "evaluation", key, to)


def set_progress(
    connection: Connection, job_id: str, fence: int, to: dict[str, Any] | None, *, has_grown: bool = True
) -> None:
    """Write the progress to the job's row only: one event each second would flood the events.

    None leaves what was written last: the attempt works at something that this does not count. `has_grown`: it is more
    than before, so that no alert says otherwise.
    """
    values: dict[str, Any] = {} if to is None else {"progress": to}
    if has_grown:
        values["progressed_at"] = database_now()
    changed = update(jobs).where(owned_by(job_id, fence)).values(**values).returning(jobs.c.id)
    if connection.execute(changed).one_or_none() is None:
        raise LeaseLost(job_id, fence)


def release(
    connection: Connection, job_id: str, fence: int, reason: str, to: Literal["queued", "paused"] = "queued"
) -> bool:
    """Return a running job to the queue, or pause it, without spending an attempt. Returns False if it is not owned.

    The job's process has ended. If the client has requested an action meanwhile, the job takes that status instead.
    """
    return _release(connection, job_id, fence, to, {}, {"reason": reason})


def postpone(connection: Connection, job_id: str, fence: int, error: dict[str, Any], wait_s: float) -> bool:
    """Return a running job to the queue for `wait_s` without spending an attempt: a full disk is not the job's fault.

    Returns False if another attempt owns the job.
    """
    later = {"error": error, "not_before": database_now() + wait_s}
    return _release(connection, job_id, fence, "queued", later, {"reason": error["code"], "error": error})


def _release(
    connection: Connection, job_id: str, fence: int, to: str, values: dict[str, Any], data: dict[str, Any]
) -> bool:
    not_spent = {"attempts_without_progress": jobs.c.attempts_without_progress - 1}
    job = update_job(connection, owned_by(job_id, fence), **not_spent, **_requested_or(to), **_NO_OWNER, **values)
    if job is None:
        return _is_done(connection, job_id, fence, "queued", "paused", "cancelled")
    released = "released" if job.status == "queued" else job.status
    close_attempt(connection, job, released)
    append_change(connection, job, released, **data)
    return True


def finish_succeeded(
    connection: Connection, job_id: str, fence: int, result: dict[str, Any], artifacts: Sequence[NewArtifact]
) -> bool:
    """Make the report, artifacts and `succeeded` visible together. Returns False if another attempt owns the job.

    All `finish_…` functions are idempotent: they return True if this attempt has made the change already, because only
    the answer to its commit was lost then.
    """
    figures = figures_of(result)
    shown = {"result": result, "figures": figures, "accuracy": figures["accuracy"]}
    job = update_job(connection, owned_by(job_id, fence), **_ended("succeeded"), **shown, error=None)
    if job is None:
        return _is_done(connection, job_id, fence, "succeeded")
    publish(connection, job_id, artifacts)
    close_attempt(connection, job, "succeeded")
    append_change(connection, job, "succeeded", artifacts=[asdict(artifact) for artifact in artifacts])
    projects.add_blobs(connection, job.project, [artifact.sha256 for artifact in artifacts])
    return True


def finish_failed(
    connection: Connection, job_id: str, fence: int, error: dict[str, Any], retry_in_s: float | None
) -> bool:
    """End the attempt with an error. With `retry_in_s`, the job is tried again after that time while attempts remain.

    Returns False if another attempt owns the job.
    """
    if retry_in_s is not None:
        job = update_job(
            connection,
            and_(owned_by(job_id, fence), _has_attempts(jobs)),
            **_requested_or("queued"),
            **_NO_OWNER,
            error=error,
            not_before=database_now() + retry_in_s,
        )
        if job is not None:
            close_attempt(connection, job, "failed")
            append_change(connection, job, job.status, error=error, retry_in_s=retry_in_s)
            return True
    job = _fail(connection, owned_by(job_id, fence), error)
    if job is None:
        after_retry = () if retry_in_s is None else ("queued", "paused", "cancelled")
        return _is_done(connection, job_id, fence, "failed", *after_retry)
    close_attempt(connection, job, "failed")
    return True


def finish_cancelled(connection: Connection, job_id: str, fence: int) -> bool:
    """End a job whose process has ended after a cancel request. Returns False if another attempt owns the job."""
    job = update_job(connection, owned_by(job_id, fence), **_ended("cancelled"))
    if job is None:
        return _is_done(connection, job_id, fence, "cancelled")
    close_attempt(connection, job, "cancelled")
    append_change(connection, job, "cancelled")
    return True


def sweep(connection: Connection, *, takeover: bool, rering_s: float = 15, max_running: int | None = None) -> list[str]:
    """End jobs that no worker will end. Returns the jobs that have been due for `rering_s`: their wake-up was lost.

    Jobs that wait for a place of their project (`max_running`, see `claim`) are not among these.

    Jobs that wait past their deadline fail. With `takeover` (see `claim`), this also ends the jobs whose lease has
    expired and that cannot be claimed: cancel or pause is requested, the deadline has passed, or no attempt is left.
    Alerts of jobs without progress are raised. Any number of sweeps may run at the same time.
    """
    must_end = _waits_past_deadline(jobs)
    if takeover:
        unclaimable = or_(jobs.c.requested.is_not(None), _is_past_deadline(jobs), ~_has_attempts(jobs))
        must_end = or_(must_end, and_(_lease_expired(jobs), unclaimable))
    ending = connection.scalars(select(jobs.c.id).where(must_end).order_by(jobs.c.id)).all()
    if ending:
        lock_with_waiting(connection, ending)
    for job_id in ending:
        _fail(connection, and_(jobs.c.id == job_id, _waits_past_deadline(jobs)), _DEADLINE_EXCEEDED)
        if takeover:
            _end_abandoned(connection, job_id)
    alerts.see_progress(connection)
    full = limits.full_projects(connection, max_running)
    missed = select(jobs.c.id).where(_is_open(jobs), _is_due(jobs), _due_since(jobs) < database_now() - rering_s)
    missed = missed.where(jobs.c.project.not_in(full)) if full else missed
    return list(connection.scalars(missed.order_by(jobs.c.priority.desc(), jobs.c.created_at).limit(100)))


def _end_abandoned(connection: Connection, job_id: str) -> None:
    """End one job. Each UPDATE checks its condition again: the owner may have extended its lease since the query."""
    expired = and_(jobs.c.id == job_id, _lease_expired(jobs))
    # If the owner comes back, it must not write any more.
    fence = jobs.c.fence + 1
    # A job without attempts would wait for ever once it is resumed.
    can_pause = and_(jobs.c.requested == "pause", _has_attempts(jobs))
    if job := update_job(connection, and_(expired, jobs.c.requested == "cancel"), **_ended("cancelled"), fence=fence):
        append_change(connection, job, "cancelled", reason="the worker stopped responding")
    elif job := update_job(connection, and_(expired, can_pause), status="paused", **_NO_OWNER, fence=fence):
        append_event(connection, job, "paused", reason="the worker stopped responding")
    else:
        job = _fail(connection, and_(expired, _is_past_deadline(jobs)), _DEADLINE_EXCEEDED, fence=fence)
        job = job or _fail(connection, and_(expired, ~_has_attempts(jobs)), _WORKER_LOST, fence=fence)
    if job is not None:
        close_attempt(connection, job, "lost")


def _fail(connection: Connection, where: ColumnElement[bool], error: dict[str, Any], **values: Any) -> Job | None:
    job = update_job(connection, where, **_ended("failed"), error=error, **values)
    if job is not None:
        append_change(connection, job, "failed", error=error)
    return job


def _first_claimable(takeover: bool, full: Sequence[str]) -> Any:
    """Return the query of the job that is next. `full`: the projects of which none may be started."""
    waiting = jobs.alias("waiting")
    can_take_over = and_(_lease_expired(waiting), waiting.c.requested.is_(None))
    can_start = and_(_is_due(waiting), waiting.c.project.not_in(full)) if full else _is_due(waiting)
    claimable = or_(can_start, can_take_over) if takeover else can_start
    return (
        select(waiting.c.id)
        .where(
            _is_open(waiting),
            claimable,
            _has_attempts(waiting),
            ~_is_past_deadline(waiting),
        )
        .order_by(waiting.c.priority.desc(), waiting.c.created_at, waiting.c.id)
        .limit(1)
    )


def _is_open(job: FromClause) -> ColumnElement[bool]:
    """The condition of the partial index, as text: SQLite uses the index only if it finds the same words."""
    return job.c.status.in_(bindparam("open", ("queued", "running"), expanding=True, literal_execute=True))


def _is_due(job: FromClause) -> ColumnElement[bool]:
    return and_(job.c.status == "queued", _due_since(job) <= database_now(), ~waits_for_teacher(job))


def _due_since(job: FromClause) -> ColumnElement[float]:
    return func.coalesce(job.c.not_before, job.c.created_at)


def _lease_expired(job: FromClause) -> ColumnElement[bool]:
    return and_(job.c.status == "running", job.c.lease_until < database_now())


def _is_past_deadline(job: FromClause) -> ColumnElement[bool]:
    return func.coalesce(job.c.deadline_at < database_now(), false())


def _waits_past_deadline(job: FromClause) -> ColumnElement[bool]:
    return and_(job.c.status.in_(("queued", "paused")), _is_past_deadline(job))


def _has_attempts(job: FromClause) -> ColumnElement[bool]:
    """The condition that attempts are left. Only attempts without progress count."""
    return or_(job.c.attempts_without_progress < job.c.max_attempts, _made_progress(job))


def _made_progress(job: FromClause) -> ColumnElement[bool]:
    """The condition that the job has a later checkpoint than at its last claim."""
    return func.coalesce(job.c.checkpoint_step, -1) > func.coalesce(job.c.claimed_step, -1)


def _ended(status: str) -> dict[str, Any]:
    return {"status": status, "finished_at": database_now(), **_NO_OWNER}


def _requested_or(status: str) -> dict[str, Any]:
    """Return the values of a job whose process has ended: the status that the client requested, else `status`."""
    cancelled = jobs.c.requested == "cancel"
    return {
        "status": case((cancelled, "cancelled"), (jobs.c.requested == "pause", "paused"), else_=status),
        "finished_at": case((cancelled, database_now())),
    }


def _is_done(connection: Connection, job_id: str, fence: int, *statuses: str) -> bool:
    """Return whether this attempt has made the change already: the job has its fence and one of these statuses."""
    done = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.fence == fence, jobs.c.status.in_(statuses))
    return connection.execute(done).one_or_none() is not None
