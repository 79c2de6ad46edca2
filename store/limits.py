"""The limits of a project: what it may have and do at once. A project's own come before those of the settings.

A limit on rows is checked in the transaction that adds them, behind a lock that lets no other transaction of the
project count at the same time. SQLite has one writer anyway.

    jobs_queued, inspections, bytes_stored    when a row is made: LimitReached or QuotaExceeded
    jobs_running                              by the claims of workers, which leave the project's jobs in the queue
    upload_bytes                              while an upload arrives
    event_streams, requests_per_s             by each API process (`api/limits.py`)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Connection, Integer, Select, func, literal, select, union, update

from store import tables
from store.errors import LimitReached, NotFound, QuotaExceeded
from store.settings import Settings
from store.tables import artifacts, checkpoints, jobs, project_blobs, projects, uploads

MOST = 2**53
"""The largest limit: every reader of JSON has the numbers up to it exactly."""
_LOCK_OF_PROJECT, _LOCK_OF_CLAIMS = 7_310_578, 7_310_579
"""Keys of advisory locks of PostgreSQL; the next after that of migrations."""

Bound = int | None


class Limits(BaseModel):
    """The limits of one project. Null: no limit of the project; the service as a whole has its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    jobs_queued: Bound = Field(default=None, ge=0, le=MOST, description="Jobs that are queued or paused.")
    jobs_running: Bound = Field(default=None, ge=0, le=MOST, description="Jobs that run at the same time.")
    bytes_stored: Bound = Field(
        default=None, ge=0, le=MOST, description="Bytes of uploads, registered files, artifacts and checkpoints."
    )
    upload_bytes: Bound = Field(default=None, ge=1, le=MOST, description="Bytes of one upload.")
    event_streams: Bound = Field(default=None, ge=0, le=MOST, description="Open event streams of one API process.")
    inspections: Bound = Field(default=None, ge=0, le=MOST, description="Registrations that are inspected at a time.")
    requests_per_s: Bound = Field(
        default=None, ge=1, le=MOST, description="Requests with a key in a second, of one API process."
    )


def defaults(settings: Settings) -> Limits:
    """Return the limits of projects that have none of their own."""
    return Limits(
        jobs_queued=settings.limit_jobs_queued,
        jobs_running=settings.limit_jobs_running,
        bytes_stored=settings.limit_bytes_stored,
        upload_bytes=settings.upload_max_bytes,
        event_streams=settings.limit_event_streams,
        inspections=settings.limit_inspections,
        requests_per_s=settings.limit_requests_per_s,
    )


def own(connection: Connection, project: str) -> dict[str, int]:
    """Return the limits that were set for a project. Raises NotFound."""
    exists = projects.c.deleted_at.is_(None)
    row = connection.execute(select(projects.c.limits).where(projects.c.name == project, exists)).one_or_none()
    if row is None:
        raise NotFound("project", project)
    return dict(row.limits or {})


def set_own(connection: Connection, project: str, changes: Mapping[str, Bound]) -> dict[str, int]:
    """Set limits of a project; None removes one, so that the default holds again. Returns all. Raises NotFound."""
    lock(connection, project)
    changed = {**own(connection, project), **changes}
    limits = {name: bound for name, bound in changed.items() if bound is not None}
    connection.execute(update(projects).where(projects.c.name == project).values(limits=limits or None))
    return limits


def lock(connection: Connection, project: str) -> None:
    """Let no other transaction count the project's rows before this one has ended. Taken before any lock of a row."""
    if connection.dialect.name == "postgresql":
        connection.execute(
            select(func.pg_advisory_xact_lock(literal(_LOCK_OF_PROJECT, Integer), func.hashtext(project)))
        )


# ── counts ──


def count_waiting(connection: Connection, project: str) -> int:
    """Return the jobs that are queued or paused: a paused one returns to the queue when a client resumes it."""
    return _count(connection, jobs.c.project == project, jobs.c.status.in_(("queued", "paused")))


def count_running(connection: Connection, project: str) -> int:
    return _count(connection, jobs.c.project == project, jobs.c.status == "running")


def count_inspections(connection: Connection, project: str) -> int:
    """Return the models and data sets that are being inspected."""
    return sum(
        _count(connection, table.c.project == project, table.c.state == "inspecting")
        for table in (tables.models, tables.datasets)
    )


def _count(connection: Connection, *conditions: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).where(*conditions)).scalar_one()


def bytes_of_uploads(connection: Connection, project: str) -> int:
    """Return the bytes of a project's uploads: of one that announced its size all of them, and each content once."""
    of_project = uploads.c.project == project
    arrives = func.coalesce(uploads.c.bytes, uploads.c.offset)
    arriving = select(func.coalesce(func.sum(arrives), 0)).where(of_project, uploads.c.status == "open")
    contents = select(uploads.c.sha256, uploads.c.bytes).where(of_project, uploads.c.status == "complete").distinct()
    return int(connection.execute(arriving).scalar_one()) + _sum(connection, contents)


def bytes_of_jobs(connection: Connection, project: str) -> int:
    """Return the bytes of a project's artifacts, each content once and none that an upload has, and of its checkpoints.

    It reads a row of every file, so it runs in a thread, and its result is kept for a while.
    """
    of_project = jobs.c.project == project
    made = select(artifacts.c.sha256, artifacts.c.bytes).join_from(artifacts, jobs).where(of_project).distinct()
    others = made.where(artifacts.c.sha256.not_in(_uploaded(project)))
    saved = select(checkpoints.c.bytes).join_from(checkpoints, jobs).where(of_project)
    return _sum(connection, others) + _sum(connection, saved)


def other_blobs(connection: Connection, project: str) -> Sequence[str]:
    """Return the digests of a project's blobs whose sizes no row has: their uploads and jobs are deleted, and a model,
    a data set or a spec names them."""
    made = select(artifacts.c.sha256).join_from(artifacts, jobs).where(jobs.c.project == project)
    known = project_blobs.c.sha256.in_(union(made, _uploaded(project)))
    return connection.scalars(select(project_blobs.c.sha256).where(project_blobs.c.project == project, ~known)).all()


def _uploaded(project: str) -> Select[tuple[Any]]:
    return select(uploads.c.sha256).where(uploads.c.project == project, uploads.c.status == "complete")


def _sum(connection: Connection, sizes: Select[Any]) -> int:
    rows = sizes.subquery()
    return int(connection.execute(select(func.coalesce(func.sum(rows.c.bytes), 0))).scalar_one())


# ── checks ──


def require_queue(connection: Connection, project: str, bound: Bound) -> None:
    """Raise LimitReached if the project may not queue one more job."""
    if bound is not None:
        lock(connection, project)
        if (used := count_waiting(connection, project)) >= bound:
            raise LimitReached("jobs_queued", bound, used, 30)


def require_inspection(connection: Connection, project: str, bound: Bound) -> None:
    """Raise LimitReached if the project may not register one more file now."""
    if bound is not None:
        lock(connection, project)
        if (used := count_inspections(connection, project)) >= bound:
            raise LimitReached("inspections", bound, used, 10)


@dataclass(frozen=True)
class Room:
    """The bytes that a project may store, and those that it has beside its uploads, as they were counted lately."""

    bound: Bound
    others: int

    def require(self, connection: Connection, project: str, more: int) -> None:
        """Raise QuotaExceeded if the project may not store so many bytes more."""
        if self.bound is not None:
            lock(connection, project)
            used = self.others + bytes_of_uploads(connection, project)
            if used + more > self.bound:
                raise QuotaExceeded("bytes_stored", self.bound, used, more)


# ── claims ──


def lock_claims(connection: Connection, default: Bound) -> None:
    """Where there are bounds, let claims wait for each other: else two at once could take a project's last place."""
    if connection.dialect.name == "postgresql" and (default is not None or _bounds(connection)):
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK_OF_CLAIMS)))


def full_projects(connection: Connection, default: Bound) -> list[str]:
    """Return the projects that run as many jobs as they may. `default`: the bound of those that have none of their
    own."""
    bounds = _bounds(connection)
    if not bounds and default is None:
        return []
    running = select(jobs.c.project, func.count()).where(jobs.c.status == "running").group_by(jobs.c.project)
    counts = {project: count for project, count in connection.execute(running)}
    bounded = {**dict.fromkeys(counts, default), **bounds}
    return [name for name, bound in bounded.items() if bound is not None and counts.get(name, 0) >= bound]


def _bounds(connection: Connection) -> dict[str, int]:
    """Return the own bounds of projects on running jobs."""
    rows = connection.execute(select(projects.c.name, projects.c.limits).where(projects.c.limits.is_not(None)))
    return {row.name: row.limits["jobs_running"] for row in rows if "jobs_running" in row.limits}
