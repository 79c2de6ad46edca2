"""What uses how much of the disk: by kind and project from the rows, by kind for all projects from the files."""

from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import Connection, func, select

from store import tables
from store.database import Database
from store.file_store import FOLDERS, FileStore, Usage, measured
from store.tables import jobs


def of_all(files: FileStore, cache: Path) -> dict[str, Usage]:
    """Return the disk usage of each folder of the store, and of the `cache`. It reads the whole tree."""
    return {folder: measured(files.folder / folder) for folder in FOLDERS} | {"cache": measured(cache)}


def of_project(database: Database, files: FileStore, project: str) -> dict[str, Usage]:
    """Return what the rows of a project use, by kind. Bytes that several rows name count once for each kind."""
    with database.connect() as connection:
        found = _of_rows(connection, project)
        for kind, table in (("models", tables.models), ("datasets", tables.datasets)):
            digests = connection.scalars(select(table.c.sha256).where(table.c.project == project).distinct())
            found[kind] = _of_blobs(files, digests)
    return found


def _of_rows(connection: Connection, project: str) -> dict[str, Usage]:
    sent, made, saved = tables.uploads.c, tables.artifacts.c, tables.checkpoints.c
    own_jobs = jobs.c.project == project
    complete = select(sent.sha256, sent.bytes).where(sent.project == project, sent.status == "complete").distinct()
    own_artifacts = select(made.sha256, made.bytes).join(jobs, jobs.c.id == made.job_id).where(own_jobs).distinct()
    queries = {
        "uploads": select(complete.subquery().c.bytes),
        "open_uploads": select(sent.offset).where(sent.project == project, sent.status == "open"),
        "artifacts": select(own_artifacts.subquery().c.bytes),
        "checkpoints": select(saved.bytes).join(jobs, jobs.c.id == saved.job_id).where(own_jobs),
    }
    found = {}
    for kind, query in queries.items():
        sizes = query.subquery()
        (size,) = sizes.c
        count, total = connection.execute(select(func.count(), func.coalesce(func.sum(size), 0))).one()
        found[kind] = Usage(int(count), int(total))
    return found


def _of_blobs(files: FileStore, digests: Iterable[str]) -> Usage:
    sizes = [size for digest in digests if (size := files.size(digest))]
    return Usage(len(sizes), sum(sizes))
