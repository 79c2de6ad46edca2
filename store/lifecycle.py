"""The lawful moves of a job. Each is one conditional UPDATE; no row back means that the move was not lawful.

    queued ──claim──▶ running ──finish──▶ succeeded | failed | cancelled
     ▲  │                │ release                        │
     │  └──▶ paused ◀────┤                                │
     └──resume──┘        └──▶ queued ◀───────retry────────┘

A lapsed lease is claimable as it stands: nobody resets it, so an owner that comes back first keeps its work.
The fence counts claims. Whoever holds an older one is turned away by the WHERE clause, however late it wakes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, FromClause, and_, case, false, func, or_, select, update

from base.errors import DeadlineExceeded, WorkerLost
from store import attempts
from store.artifacts import NewArtifact, publish
from store.checkpoints import Checkpoint, newest
from store.clock import database_now
from store.errors import LeaseLost
from store.events import tell
from store.fence import change, mine
from store.rows import Job
from store.tables import jobs

_TOO_LATE = DeadlineExceeded(
    "the job had not ended by its deadline", "retry it: it goes on from its last checkpoint and has as long again"
).as_dict()

LET_GO: dict[str, Any] = {"owner": None, "lease_until": None, "requested": None, "phase": None}


@dataclass(frozen=True)
class Claim:
    """A job that is ours until the lease lapses. `checkpoints`: what it may go on from, newest first."""

    job: Job
    fence: int
    attempts_without_progress: int
    checkpoints: list[Checkpoint]
    takeover: bool
    """Its former owner fell silent."""


def claim(
    connection: Connection, owner: str, lease_s: float, *, rescue: bool, device: str | None = None
) -> Claim | None:
    """Take the oldest job that waits; with `rescue`, also one whose owner has fallen silent. None: nothing to do.

    Rescue only after one lease of unbroken contact with the database: silence that is ours is not the owner's.
    """
    first = _claimable_first(rescue).with_for_update(skip_locked=True).scalar_subquery()
    job = change(
        connection,
        jobs.c.id == first,
        status="running",
        fence=jobs.c.fence + 1,
        attempts_without_progress=case((_got_somewhere(jobs), 1), else_=jobs.c.attempts_without_progress + 1),
        claimed_step=jobs.c.checkpoint_step,
        owner=owner,
        lease_until=database_now() + lease_s,
        started_at=func.coalesce(jobs.c.started_at, database_now()),
        not_before=None,
        phase=None,
        # The attempt before told of it in the feed; this one has not failed.
        error=None,
    )
    if job is None:
        return None
    takeover = attempts.close(connection, job, "lost")
    attempts.open(connection, job, owner, device)
    tell(connection, job, "claimed", attempt=job.fence, worker=owner, device=device, takeover=takeover)
    return Claim(job, job.fence, job.attempts_without_progress, newest(connection, job.id), takeover)


def peek(connection: Connection, rescue: bool) -> bool:
    """Whether a claim would find something; takes no lock, so that looking costs nobody anything."""
    return connection.execute(_claimable_first(rescue)).one_or_none() is not None


def heartbeat(connection: Connection, job_id: str, fence: int, lease_s: float) -> str | None:
    """Extend the lease; returns the client's request (`cancel`, `pause`) or None.

    Raises LeaseLost when another attempt owns the job: the caller must stop its training at once.
    """
    beat = (
        update(jobs).where(mine(job_id, fence)).values(lease_until=database_now() + lease_s).returning(jobs.c.requested)
    )
    row = connection.execute(beat).one_or_none()
    if row is None:
        raise LeaseLost(job_id, fence)
    requested: str | None = row.requested
    return requested


def phase(connection: Connection, job_id: str, fence: int, phase: str) -> None:
    job = change(connection, mine(job_id, fence), phase=phase)
    if job is None:
        raise LeaseLost(job_id, fence)
    tell(connection, job, "phase", phase=phase)


def progress(connection: Connection, job_id: str, fence: int, progress: dict[str, Any]) -> None:
    """How far it is. On the row alone: once a second would drown the feed."""
    far = update(jobs).where(mine(job_id, fence)).values(progress=progress).returning(jobs.c.id)
    if connection.execute(far).one_or_none() is None:
        raise LeaseLost(job_id, fence)


def release(
    connection: Connection, job_id: str, fence: int, reason: str, to: Literal["queued", "paused"] = "queued"
) -> bool:
    """Hand a running job back, its attempt unspent (drain, pause). False when it is no longer ours.

    The process has ended, so a request that came meanwhile is granted here: a cancelled job is not queued again.
    """
    return _hand_back(connection, job_id, fence, to, {}, {"reason": reason})


def postpone(connection: Connection, job_id: str, fence: int, error: dict[str, Any], wait_s: float) -> bool:
    """Hand a running job back for `wait_s`, its attempt unspent: what it met is not its fault (a full disk).

    False when it is no longer ours.
    """
    later = {"error": error, "not_before": database_now() + wait_s}
    return _hand_back(connection, job_id, fence, "queued", later, {"reason": error["code"], "error": error})


def _hand_back(
    connection: Connection, job_id: str, fence: int, to: str, values: dict[str, Any], told: dict[str, Any]
) -> bool:
    unspent = {"attempts_without_progress": jobs.c.attempts_without_progress - 1, **_granted(to), **LET_GO, **values}
    job = change(connection, mine(job_id, fence), **unspent)
    if job is None:
        return _stands(connection, job_id, fence, ("queued", "paused", "cancelled"))
    attempts.close(connection, job, job.status if job.status != "queued" else "released")
    tell(connection, job, "released" if job.status == "queued" else job.status, **told)
    return True


def finish_succeeded(
    connection: Connection, job_id: str, fence: int, result: dict[str, Any], artifacts: Sequence[NewArtifact]
) -> bool:
    """Make report, artifacts and `succeeded` visible together. False when it is no longer ours.

    True also where the row says so already by this fence: the answer to our commit was lost, and not the commit.
    """
    job = change(connection, mine(job_id, fence), **_ended("succeeded"), result=result, error=None)
    if job is None:
        return _stands(connection, job_id, fence, ("succeeded",))
    publish(connection, job_id, artifacts)
    attempts.close(connection, job, "succeeded")
    tell(connection, job, "succeeded", artifacts=[asdict(artifact) for artifact in artifacts])
    return True


def finish_failed(
    connection: Connection, job_id: str, fence: int, error: dict[str, Any], retry_in_s: float | None
) -> bool:
    """End the attempt with an error. With `retry_in_s` the job waits so long and is tried again, while attempts last.

    False when it is no longer ours; True also where the row says so already by this fence.
    """
    if retry_in_s is not None:
        again = change(
            connection,
            and_(mine(job_id, fence), _has_attempts(jobs)),
            **_granted("queued"),
            **LET_GO,
            error=error,
            not_before=database_now() + retry_in_s,
        )
        if again is not None:
            attempts.close(connection, again, "failed")
            tell(connection, again, again.status, error=error, retry_in_s=retry_in_s)
            return True
    job = change(connection, mine(job_id, fence), **_ended("failed"), error=error)
    if job is None:
        tried_again = () if retry_in_s is None else ("queued", "paused", "cancelled")
        return _stands(connection, job_id, fence, ("failed", *tried_again))
    attempts.close(connection, job, "failed")
    tell(connection, job, "failed", error=error)
    return True


def finish_cancelled(connection: Connection, job_id: str, fence: int) -> bool:
    """The process has ended as the client wished. False when it is no longer ours."""
    job = change(connection, mine(job_id, fence), **_ended("cancelled"))
    if job is None:
        return _stands(connection, job_id, fence, ("cancelled",))
    attempts.close(connection, job, "cancelled")
    tell(connection, job, "cancelled")
    return True


def sweep(connection: Connection, *, rescue: bool, rering_s: float = 15) -> list[str]:
    """Tidy after owners that are gone, and return the jobs that have waited so long that the bell must have been lost.

    Nobody else may end what a silent owner left: the cancelled, the paused, those past their deadline, and those out of
    attempts. It needs the same patience as a claim's `rescue`. Who waits past the deadline fails without it. Any number
    of sweeps may run at once.
    """
    for job_id in connection.scalars(select(jobs.c.id).where(_waits_in_vain(jobs)).order_by(jobs.c.id)).all():
        _end_in_vain(connection, job_id)
    if rescue:
        for job_id in _abandoned(connection):
            _end_abandoned(connection, job_id)
    silent = select(jobs.c.id).where(_due(jobs), _due_since(jobs) < database_now() - rering_s)
    return list(connection.scalars(silent.order_by(jobs.c.priority.desc(), jobs.c.created_at).limit(100)))


def _abandoned(connection: Connection) -> list[str]:
    ended = or_(jobs.c.requested.is_not(None), _overdue(jobs), ~_has_attempts(jobs))
    left = select(jobs.c.id).where(_lapsed(jobs), ended)
    return list(connection.scalars(left.order_by(jobs.c.id)))


def _end_abandoned(connection: Connection, job_id: str) -> None:
    """The condition is asked again in each UPDATE: the owner may have come back since it was looked for."""
    lapsed = and_(jobs.c.id == job_id, _lapsed(jobs))
    fenced_off = {"fence": jobs.c.fence + 1}
    # Once resumed, one without an attempt left would wait for ever.
    pausable = and_(jobs.c.requested == "pause", _has_attempts(jobs))
    if job := change(connection, and_(lapsed, jobs.c.requested == "cancel"), **_ended("cancelled"), **fenced_off):
        tell(connection, job, "cancelled", reason="its worker is gone")
    elif job := change(connection, and_(lapsed, pausable), status="paused", **LET_GO, **fenced_off):
        tell(connection, job, "paused", reason="its worker is gone")
    elif job := change(connection, and_(lapsed, _overdue(jobs)), **_ended("failed"), **fenced_off, error=_TOO_LATE):
        tell(connection, job, "failed", error=_TOO_LATE)
    else:
        lost = WorkerLost(
            "the worker vanished, and no attempt is left",
            "retry the job; if it happens again, look at the log: the job may kill its worker",
        ).as_dict()
        job = change(connection, and_(lapsed, ~_has_attempts(jobs)), **_ended("failed"), **fenced_off, error=lost)
        if job is None:
            return
        tell(connection, job, "failed", error=lost)
    attempts.close(connection, job, "lost")


def _end_in_vain(connection: Connection, job_id: str) -> None:
    job = change(connection, and_(jobs.c.id == job_id, _waits_in_vain(jobs)), **_ended("failed"), error=_TOO_LATE)
    if job is not None:
        tell(connection, job, "failed", error=_TOO_LATE)


def _claimable_first(rescue: bool) -> Any:
    waiting = jobs.alias("waiting")
    ripe = or_(_due(waiting), and_(_lapsed(waiting), waiting.c.requested.is_(None))) if rescue else _due(waiting)
    return (
        select(waiting.c.id)
        .where(waiting.c.status.in_(("queued", "running")), ripe, _has_attempts(waiting), ~_overdue(waiting))
        .order_by(waiting.c.priority.desc(), waiting.c.created_at, waiting.c.id)
        .limit(1)
    )


def _due(job: FromClause) -> ColumnElement[bool]:
    return and_(job.c.status == "queued", _due_since(job) <= database_now())


def _due_since(job: FromClause) -> ColumnElement[float]:
    return func.coalesce(job.c.not_before, job.c.created_at)


def _lapsed(job: FromClause) -> ColumnElement[bool]:
    return and_(job.c.status == "running", job.c.lease_until < database_now())


def _overdue(job: FromClause) -> ColumnElement[bool]:
    """Past the deadline that its sender set; a job without one never is."""
    return func.coalesce(job.c.deadline_at < database_now(), false())


def _waits_in_vain(job: FromClause) -> ColumnElement[bool]:
    return and_(job.c.status.in_(("queued", "paused")), _overdue(job))


def _has_attempts(job: FromClause) -> ColumnElement[bool]:
    """The budget limits attempts that get nowhere (poison jobs), not bad nights."""
    return or_(job.c.attempts_without_progress < job.c.max_attempts, _got_somewhere(job))


def _got_somewhere(job: FromClause) -> ColumnElement[bool]:
    return func.coalesce(job.c.checkpoint_step, -1) > func.coalesce(job.c.claimed_step, -1)


def _ended(status: str) -> dict[str, Any]:
    return {"status": status, "finished_at": database_now(), **LET_GO}


def _granted(otherwise: str) -> dict[str, Any]:
    """Where a job goes whose process has ended: where the client wished, else back to wait."""
    return {
        "status": case(
            (jobs.c.requested == "cancel", "cancelled"), (jobs.c.requested == "pause", "paused"), else_=otherwise
        ),
        "finished_at": case((jobs.c.requested == "cancel", database_now())),
    }


def _stands(connection: Connection, job_id: str, fence: int, statuses: tuple[str, ...]) -> bool:
    """Whether the row says by this fence already what we came to write."""
    said = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.fence == fence, jobs.c.status.in_(statuses))
    return connection.execute(said).one_or_none() is not None
