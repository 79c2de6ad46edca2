"""Projects: each separates jobs, models, data sets, uploads and blobs. `default` always exists.

A project has a blob from the moment when one of its rows first names it (`add_blobs`, in the transaction that writes
the row) until none has named it for some time (`forget_blobs`, by the collector). A client's digest is looked up among
the blobs of its project (`has_blob`), so what other projects have cannot be found.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, and_, delete, select, tuple_, update

from base.defaults import DEFAULT_PROJECT
from store import tables
from store.errors import NameTaken, NotFound, ProjectNotEmpty
from store.records import as_record, columns, database_now, upsert

SEEN_EVERY_S = 600.0
"""The age at which the time of a blob's row is written again: most submissions name the same blobs as those before."""

HOLDS: tuple[Table, ...] = (tables.jobs, tables.models, tables.datasets, tables.uploads)
"""The tables whose rows keep a project from being deleted."""


@dataclass(frozen=True)
class Project:
    """One row of `projects`."""

    name: str
    created_at: float
    limits: dict[str, Any] | None


PROJECT_COLUMNS = columns(tables.projects, Project)
_EXISTS = tables.projects.c.deleted_at.is_(None)


def create(connection: Connection, name: str) -> Project:
    """Add a project. Raises NameTaken, also for the name of a deleted one."""
    added = upsert(connection, tables.projects).values(name=name, created_at=database_now()).on_conflict_do_nothing()
    row = connection.execute(added.returning(*PROJECT_COLUMNS)).one_or_none()
    if row is None:
        known = select(tables.projects.c.deleted_at).where(tables.projects.c.name == name)
        raise NameTaken("project", name, deleted=connection.execute(known).scalar_one() is not None)
    return as_record(Project, row)


def get(connection: Connection, name: str) -> Project:
    query = select(*PROJECT_COLUMNS).where(tables.projects.c.name == name, _EXISTS)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound("project", name)
    return as_record(Project, row)


def list_page(connection: Connection, limit: int, after: str | None = None) -> tuple[list[Project], str | None]:
    """Return a page of projects by name, and the `after` of the next page, None at the end."""
    query = select(*PROJECT_COLUMNS).where(_EXISTS).order_by(tables.projects.c.name).limit(limit + 1)
    if after is not None:
        query = query.where(tables.projects.c.name > after)
    rows = [as_record(Project, row) for row in connection.execute(query)]
    return rows[:limit], rows[limit - 1].name if len(rows) > limit else None


def remove(connection: Connection, name: str) -> None:
    """Delete a project that has no rows, and end its keys. Raises NotFound, or ProjectNotEmpty that says what it has.

    Its name cannot be used again: a request of one of its keys may still be running, and its audit log stays.
    """
    get(connection, name)
    holds = [table.name for table in HOLDS if _any(connection, table, name)]
    if name == DEFAULT_PROJECT or holds:
        raise ProjectNotEmpty(name, holds)
    for table in (tables.project_blobs, tables.measurements, tables.webhooks):
        connection.execute(delete(table).where(table.c.project == name))
    now, project_keys = database_now(), tables.keys.c
    ended = update(tables.keys).where(project_keys.project == name, project_keys.revoked_at.is_(None))
    connection.execute(ended.values(revoked_at=now))
    connection.execute(update(tables.projects).where(tables.projects.c.name == name).values(deleted_at=now))


def add_blobs(connection: Connection, project: str, digests: Iterable[str]) -> None:
    """Write that a project has these blobs. Idempotent.

    It comes last in its transaction, and in the order of digests: so no two transactions wait for each other's rows.
    """
    wanted, rows = set(digests), tables.project_blobs.c
    if not wanted:
        return
    seen_lately = and_(rows.project == project, rows.sha256.in_(wanted), rows.seen_at > database_now() - SEEN_EVERY_S)
    for sha256 in sorted(wanted.difference(connection.scalars(select(rows.sha256).where(seen_lately)))):
        values = {"project": project, "sha256": sha256, "seen_at": database_now()}
        added = upsert(connection, tables.project_blobs).values(**values)
        again = added.on_conflict_do_update(index_elements=["project", "sha256"], set_={"seen_at": database_now()})
        connection.execute(again)


def has_blob(connection: Connection, project: str, sha256: str) -> bool:
    rows = tables.project_blobs.c
    query = select(rows.sha256).where(rows.project == project, rows.sha256 == sha256)
    return connection.execute(query).one_or_none() is not None


def forget_blob(connection: Connection, project: str, sha256: str) -> None:
    """Delete the row of a blob that no row of the project names any more."""
    rows = tables.project_blobs
    connection.execute(delete(rows).where(rows.c.project == project, rows.c.sha256 == sha256))


def forget_blobs(connection: Connection, named: Collection[tuple[str, str]], after_s: float, limit: int) -> int:
    """Delete rows of blobs that no row of their project names (`named`: project and digest) and that were not seen for
    `after_s`. Returns their number, at most `limit`."""
    rows = tables.project_blobs.c
    old = rows.seen_at < database_now() - after_s
    pairs = connection.execute(select(rows.project, rows.sha256).where(old).order_by(rows.project, rows.sha256))
    unnamed = [(row.project, row.sha256) for row in pairs if (row.project, row.sha256) not in named][:limit]
    if not unnamed:
        return 0
    # The age is checked again: a job may have named the blob meanwhile.
    forgotten = delete(tables.project_blobs).where(tuple_(rows.project, rows.sha256).in_(unnamed), old)
    return connection.execute(forgotten).rowcount


def _any(connection: Connection, table: Table, project: str) -> bool:
    return connection.execute(select(table.c.id).where(table.c.project == project).limit(1)).one_or_none() is not None
