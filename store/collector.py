"""The collector: deletes files and rows that are not needed any more, and no file that a row names.

    blobs         that no row names: to the trash after `after_s` without use; deleted after the same time there
    checkpoints   of succeeded jobs; of failed and cancelled ones after `checkpoints_s`; files that no row can name
    logs          of deleted jobs
    uploads       without use, row and file (but not the blob of a complete upload): after `uploads_s`, open ones after
                  `open_uploads_s`, open ones without a byte after EMPTY_S
    temporaries   of killed processes
    inspections   rows of facts that were not used for `inspections_s`: a later use inspects again
    rows          of the audit log after `audit_s`; of idempotency keys whose things are gone

No needed blob is lost. A process that will name a blob in a row has put it, or has requested its path; both renew its
last use and restore it from the trash. So a blob is deleted only `after_s` after the last moment at which a process
could have requested it. By then each such process has committed its row or failed, and the rows are read once more
before the deletion. All rows are read as of one moment, so a digest that moves from one row to another is not missed. A
row may name a blob that is in the trash for a while: each collection restores such blobs, and so does every reader.
None of this needs a lock, so it holds for any number of collectors, and for one that is killed at any line.

No needed checkpoint is lost. An attempt that has lost its fence, or whose job is not running, cannot add a row any
more. Its files are listed first, then the fence is read, then the rows: a file without a row then never gets one.

A database without a collection older than `after_s` may be the wrong one, which names no files. Until then, files of
unknown jobs and uploads are not deleted, and blobs are at most moved to the trash.

On request nothing waits (`free_now`, `free_blob`): instead of a time without use, it is looked up that no process is
between a file and its row. A job that publishes, a registration, and an upload that is completed have rows that say so.
While there is one, only what was unused for BUSY_S is deleted.
"""

import re
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, Table, Text, and_, cast, exists, or_, select

from base.errors import DatabaseUnavailable, StorageFull
from base.failpoints import failpoint
from base.files import files_in, modified_at
from base.jobs import READS_ONCE, TERMINAL
from base.references import BLOB
from store import audit, checkpoints, collections, idempotency, projects, registry, tables, uploads
from store.collections import Removed
from store.database import Database
from store.errors import UploadBusy
from store.file_store import FileStore, measured
from store.records import database_now
from store.settings import Settings
from store.tables import jobs

T = TypeVar("T")

EMPTY_S = 3600.0
"""The age at which an upload without a byte is deleted."""
BUSY_S = 3600.0
"""Longer than any process takes from a file to the row that names it."""
BATCH = 200
JOBS_PER_TRANSACTION = 25
PAUSE_S = 0.12
_NAMED = re.compile(BLOB + "([0-9a-f]{64})")
_SHA256 = re.compile("[0-9a-f]{64}")
_JOB = re.compile("job_[0-9a-z]{24}")
_FENCE = re.compile("[0-9]+")
_UPLOAD = re.compile("up_[0-9a-z]{24}")


@dataclass(frozen=True)
class Retention:
    """The time in seconds after which files that may be needed again are deleted."""

    after_s: float
    checkpoints_s: float
    uploads_s: float
    open_uploads_s: float
    audit_s: float = 365 * 86_400.0
    inspections_s: float = 30 * 86_400.0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            settings.collect_after_s,
            settings.retain_checkpoints_s,
            settings.retain_uploads_s,
            settings.retain_open_uploads_s,
            settings.retain_audit_s,
            settings.retain_inspections_s,
        )


class Stopped(Exception):
    """The process was requested to stop. The next collection continues."""


def collect(collector: "Collector", every_s: float) -> bool:
    """Run the collector and write its row. Returns False if another collection has begun within `every_s`.

    If the disk is full, it runs without a row, because it frees disk space.
    """
    database = collector.database
    try:
        with database.begin() as connection:
            collection_id = collections.begin(connection, socket.gethostname(), every_s)
    except StorageFull:
        collector.run()
        return True
    if collection_id is None:
        return False
    try:
        collector.run()
    except Stopped:
        collector.faults.append("stopped before the end")
    finally:
        with database.begin() as connection:
            collections.end(connection, collection_id, collector.removed, "; ".join(collector.faults) or None)
    return True


@dataclass
class Collector:
    """One collection. With `dry_run` it reports what it would remove and changes nothing."""

    database: Database
    files: FileStore
    retention: Retention
    dry_run: bool = False
    stopped: Callable[[], bool] = lambda: False
    report: Callable[[str, Path, int], None] = lambda kind, path, bytes: None
    """Called for each removal with its kind, path and bytes."""
    on_demand: bool = False
    """Delete what no row names at once, without a time without use."""
    removed: Removed = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """The steps that failed; the others were done."""

    def run(self) -> None:
        """Run all steps once. Raises DatabaseUnavailable or Stopped."""
        with self.database.connect() as connection:
            knows_its_files = collections.has_collected_for(connection, self.retention.after_s)
        # The steps that free disk space without needing any come first.
        steps = [self.empty_trash, self.expire_checkpoints]
        steps += [self.tidy_checkpoints, self.tidy_logs, self.tidy_uploads] if knows_its_files else []
        steps += [self.expire_uploads, self.expire_inspections, self.forget_blobs, self.fill_trash]
        steps += [self.delete_temporaries, self.expire_rows]
        # Last: the steps before it have taken names from blobs.
        steps += [self.free_now] if self.on_demand and knows_its_files else []
        for step in steps:
            try:
                step()
            except DatabaseUnavailable:
                raise
            except (OSError, StorageFull) as error:
                self.faults.append(f"{step.__name__}: {error}")

    # ── blobs ──

    def empty_trash(self) -> None:
        """Restore the blobs that a row names; delete those that have been in the trash for long enough."""
        before = self._before(self.retention.after_s)
        named = named_digests(self.database)
        for path in self._each(_matching(self.files.folder / "trash", _SHA256)):
            was_put_again = self.files.last_used_at(path.name) > float("-inf")
            if path.name in named and not was_put_again:
                self._do("brought_back", path, self.files.restore, path.name)
            elif _moved_at(path) <= before:
                failpoint("collector.removing")
                self._do("blobs", path, _unlink, path)

    def fill_trash(self) -> None:
        """Move the blobs that no row names to the trash, then read the rows again and restore those named meanwhile."""
        before = self._before(self.retention.after_s)
        named = named_digests(self.database)
        moved = []
        for path in self._each(_blobs(self.files)):
            if path.name not in named and self.files.last_used_at(path.name) <= before:
                moved += self._do("to_trash", path, self.files.move_to_trash, path.name, before)
                failpoint("collector.moved")
        if moved and not self.dry_run:
            for sha256 in {path.name for path in moved} & named_digests(self.database):
                self._do("brought_back", self.files.trash_path(sha256), self.files.restore, sha256)

    def forget_blobs(self) -> None:
        """Delete the rows of blobs that a project had, but has not named for some time."""
        if self.dry_run:
            return
        named, forgotten = named_by_project(self.database), BATCH
        while forgotten == BATCH:
            if self.stopped():
                raise Stopped
            with self._begin() as connection:
                forgotten = projects.forget_blobs(connection, named, self.retention.after_s, BATCH)

    def free_now(self) -> None:
        """Delete the blobs that no row names; while a process is between a file and its row, only those long unused."""
        busy, named = self._names_now()
        before = self._before(BUSY_S if busy else 0.0)
        for path in self._each(_blobs(self.files)):
            if path.name not in named and self.files.last_used_at(path.name) <= before:
                self._do("to_trash", path, self.files.move_to_trash, path.name, before)
        # Listed before the rows are read: what is put again after that is among the blobs.
        trash = list(_matching(self.files.folder / "trash", _SHA256))
        busy, named = self._names_now()
        before = self._before(BUSY_S if busy else 0.0)
        for path in self._each(trash):
            if path.name in named:
                self._do("brought_back", path, self.files.restore, path.name)
            elif modified_at(path) <= before:
                self._do("blobs", path, _unlink, path)

    def _names_now(self) -> tuple[bool, set[str]]:
        busy, pairs = _names_now(self.database)
        return busy, {digest for _, digest in pairs}

    # ── files of jobs ──

    def expire_checkpoints(self) -> None:
        """Delete the rows of expired checkpoints. `tidy_checkpoints` then deletes their files."""
        with self.database.connect() as connection:
            expired = checkpoints.list_expired(connection, self.retention.checkpoints_s)
        for job_ids in self._each(_batches(iter([] if self.dry_run else expired), JOBS_PER_TRANSACTION)):
            with self._begin() as connection:
                for job_id in job_ids:
                    checkpoints.delete_expired(connection, job_id, self.retention.checkpoints_s)
            failpoint("collector.expired")

    def tidy_checkpoints(self) -> None:
        """Delete the files of checkpoints that no row names, or ever can."""
        for folders in _batches(_matching(self.files.folder / "checkpoints", _JOB)):
            # List the files before the rows are read: a file written later is not considered.
            listed = {folder: list(_attempts(folder)) for folder in folders}
            rows = self._rows_of([folder.name for folder in folders])
            for folder, attempts in self._each(listed.items()):
                job = rows.jobs.get(folder.name)
                if job is None:
                    self._remove_unknown("checkpoints", folder)
                    continue
                for attempt in attempts:
                    if job.is_past(attempt.fence):
                        self._tidy_attempt(attempt, rows.paths)
                if job.status in TERMINAL:
                    self._remove_empty(folder)

    def tidy_logs(self) -> None:
        """Delete the logs of deleted jobs."""
        for folders in _batches(_matching(self.files.folder / "logs", _JOB)):
            known = self._rows_of([folder.name for folder in folders]).jobs
            for folder in self._each(folders):
                if folder.name not in known:
                    self._remove_unknown("logs", folder)

    def _tidy_attempt(self, attempt: "_Attempt", named: set[str]) -> None:
        for path in attempt.paths:
            if self.files.relative(path) not in named:
                self._do("checkpoints", path, _unlink, path)
        self._remove_empty(attempt.folder)

    def _remove_empty(self, folder: Path) -> None:
        if not self.dry_run:
            with suppress(OSError):
                folder.rmdir()

    def _rows_of(self, job_ids: list[str]) -> "_Rows":
        with self.database.connect() as connection:
            # Read the fences before the paths: an attempt that has ended by now adds no row any more.
            query = select(jobs.c.id, jobs.c.status, jobs.c.fence).where(jobs.c.id.in_(job_ids))
            known = {row.id: _Job(row.status, row.fence) for row in connection.execute(query)}
            rows = tables.checkpoints.c
            paths = select(rows.path).where(rows.job_id.in_(job_ids))
            if self.dry_run:
                expired = checkpoints.list_expired(connection, self.retention.checkpoints_s)
                paths = paths.where(rows.job_id.not_in(expired))
            return _Rows(known, set(connection.scalars(paths)))

    def _remove_unknown(self, kind: str, folder: Path) -> None:
        before = self._before(self.retention.after_s)
        if all(modified_at(path) <= before for path in [folder, *files_in(folder)]):
            self._do(kind, folder, _remove_tree, folder)

    # ── uploads and temporaries ──

    def expire_uploads(self) -> None:
        """Delete the uploads that were not used for long enough, rows and files."""
        kept_s = {"complete": self.retention.uploads_s, "open": self.retention.open_uploads_s, "empty": EMPTY_S}
        with self.database.connect() as connection:
            old = uploads.list_older_than(connection, kept_s)
        now = self.files.now()
        for upload in self._each(old):
            path = self.files.upload_path(upload.id)
            if upload.kind == "complete":
                used_at = self.files.last_used_at(str(upload.sha256))
            else:
                used_at = modified_at(path) if path.exists() else float("-inf")
            if used_at <= now - kept_s[upload.kind]:
                with suppress(UploadBusy):
                    self._do("uploads", path, self._delete_upload, upload)

    def expire_inspections(self) -> None:
        """Delete the rows of inspections that were not used for long enough."""
        age_s = self.retention.inspections_s
        with self.database.connect() as connection:
            count = registry.count_unused_inspections(connection, age_s)
        if count and not self.dry_run:
            with self._begin() as connection:
                count = registry.delete_unused_inspections(connection, age_s)
        if count:
            self.removed["inspections"] = {"count": count, "bytes": 0}

    def tidy_uploads(self) -> None:
        """Delete the files whose upload is deleted or complete."""
        before = self._before(self.retention.after_s)
        for paths in _batches(_matching(self.files.folder / "uploads", _UPLOAD)):
            rows = tables.uploads.c
            still_open = select(rows.id).where(rows.id.in_([path.name for path in paths]), rows.status == "open")
            with self.database.connect() as connection:
                known = set(connection.scalars(still_open))
            for path in self._each(paths):
                if path.name not in known and modified_at(path) <= before:
                    self._do("uploads", path, _unlink, path)

    def expire_rows(self) -> None:
        """Delete old entries of the audit log, and idempotency keys whose things are gone. They are no files, and not
        counted."""
        while not self.dry_run:
            if self.stopped():
                raise Stopped
            with self._begin() as connection:
                count = audit.delete_older_than(connection, self.retention.audit_s, BATCH)
                count += idempotency.delete_free(connection, BATCH)
            if not count:
                break

    def delete_temporaries(self) -> None:
        for path in self._each(self.files.temporaries()):
            self._do("temporaries", path, _unlink, path)

    def _delete_upload(self, upload: uploads.Upload) -> bool:
        with uploads.lock_file(self.files, upload.id):
            with self._begin() as connection:
                deleted = uploads.delete_upload(connection, upload)
            if deleted:
                uploads.delete_file(self.files, upload.id)
            return deleted

    # ── for all steps ──

    def _do(self, kind: str, path: Path, act: Callable[..., bool], *arguments: object) -> list[Path]:
        """Call `act`, unless this is a dry run. If it removed something, count and report that, and return the path."""
        size = measured(path).bytes
        if not (self.dry_run or act(*arguments)):
            return []
        tally = self.removed.setdefault(kind, {"count": 0, "bytes": 0})
        tally["count"] += 1
        tally["bytes"] += size
        self.report(kind, path, size)
        return [path]

    def _each(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            if self.stopped():
                raise Stopped
            yield item

    @contextmanager
    def _begin(self) -> Iterator[Connection]:
        with self.database.begin() as connection:
            yield connection
        # SQLite's lock is not fair: waiting writers poll every 0.1 s, and heartbeats must get their turn.
        time.sleep(PAUSE_S)

    def _before(self, age_s: float) -> float:
        return self.files.now() - age_s


@dataclass(frozen=True)
class _Attempt:
    """The folder of an attempt's checkpoints, as it was when it was listed."""

    folder: Path
    fence: int
    paths: list[Path]


@dataclass(frozen=True)
class _Job:
    status: str
    fence: int

    def is_past(self, fence: int) -> bool:
        """Return whether the attempt of that fence cannot add a row any more."""
        return fence < self.fence or (fence == self.fence and self.status != "running")


@dataclass(frozen=True)
class _Rows:
    jobs: dict[str, _Job]
    paths: set[str]
    """The paths of checkpoints, as their rows store them."""


def named_digests(database: Database) -> set[str]:
    """Return every digest that a row names, all as of one moment."""
    return {digest for _, digest in named_by_project(database)}


def named_by_project(database: Database) -> set[tuple[str, str]]:
    """Return every digest that a row names, with the row's project, all as of one moment."""
    return _names_now(database)[1]


def _names_now(database: Database) -> tuple[bool, set[tuple[str, str]]]:
    """Return whether a process may be between a file and its row, and what `named_by_project` returns, as of then."""
    with database.connect() as connection:
        if not database.is_sqlite:
            connection.execution_options(isolation_level="REPEATABLE READ")
        return _is_busy(connection), {pair for pairs in named_in(connection) for pair in pairs if pair[1]}


def _is_busy(connection: Connection) -> bool:
    """Return whether a process may have put a blob that no row names yet, but one soon will."""
    sent = tables.uploads.c
    between = (
        exists().where(jobs.c.status == "running", jobs.c.phase == "publishing"),
        exists().where(tables.models.c.state == "inspecting"),
        exists().where(tables.datasets.c.state == "inspecting"),
        # All its bytes have arrived, and it is not complete. Only one that is sent whole has no length in its row.
        exists().where(
            sent.status == "open",
            sent.offset > 0,
            or_(sent.bytes.is_(None), sent.bytes == sent.offset),
            sent.created_at > database_now() - BUSY_S,
        ),
    )
    return bool(connection.execute(select(or_(*between))).scalar_one())


def free_blob(database: Database, files: FileStore, project: str, sha256: str) -> bool:
    """Take a blob from a project whose row was deleted, unless another row of it names the blob; and delete it, unless
    a row of any project names it or may soon. Returns whether its bytes are free.

    What is not deleted now is left to the collector.
    """
    with database.begin() as connection:
        if _is_named(connection, sha256, project):
            return False
        projects.forget_blob(connection, project, sha256)
        if _is_named(connection, sha256):
            return False
    files.move_to_trash(sha256, float("inf"))
    with database.connect() as connection:
        if not database.is_sqlite:
            connection.execution_options(isolation_level="REPEATABLE READ")
        if _is_named(connection, sha256):
            files.restore(sha256)
            return False
        if _is_busy(connection):
            return False
    return _unlink(files.trash_path(sha256))


def _is_named(connection: Connection, sha256: str, project: str | None = None) -> bool:
    """Return whether a row names the blob: one of any project, or of the given one."""
    named, sheets = tables.artifacts.c.sha256 == sha256, cast(tables.datasets.c.thumbnails, Text)
    readable = [
        (table, and_(table.c.sha256 == sha256, table.c.state != "refused"))
        for table in (tables.models, tables.datasets)
    ]
    conditions = [
        (tables.uploads, tables.uploads.c.sha256 == sha256),
        *readable,
        (tables.datasets, sheets.contains(sha256)),
        (jobs, jobs.c.id.in_(select(tables.artifacts.c.job_id).where(named))),
        (jobs, and_(cast(jobs.c.resolved_spec, Text).contains(BLOB + sha256), _reads_its_files())),
    ]
    # One after the other: the last one reads a whole table.
    return any(
        connection.execute(select(exists().where(condition, *_of(table, project)))).scalar_one()
        for table, condition in conditions
    )


def _reads_its_files() -> ColumnElement[bool]:
    """Return the condition that a job may still read the files that its spec names, or shows what it was made of."""
    return ~and_(jobs.c.status == "succeeded", jobs.c.kind.in_(READS_ONCE))


def _of(table: Table, project: str | None) -> list[ColumnElement[bool]]:
    return [] if project is None else [table.c.project == project]


def named_in(connection: Connection) -> Iterator[Iterable[tuple[str, str]]]:
    """Yield every digest that a row names, with its project, in groups, with repetitions and nulls."""
    made = tables.artifacts.join(jobs)
    yield _pairs(connection, select(jobs.c.project, tables.artifacts.c.sha256).select_from(made).distinct())
    yield _pairs(connection, select(tables.uploads.c.project, tables.uploads.c.sha256).distinct())
    for table in (tables.models, tables.datasets):
        # Nothing reads the file of a refused row.
        readable = table.c.state != "refused"
        yield _pairs(connection, select(table.c.project, table.c.sha256).where(readable).distinct())
    sheets = tables.datasets.c.thumbnails
    pictured = select(tables.datasets.c.project, sheets).where(sheets.is_not(None))
    yield [(project, sheet["sha256"]) for project, sheet in _pairs(connection, pictured)]
    spec, after = cast(jobs.c.resolved_spec, Text), ""
    naming = select(jobs.c.id, jobs.c.project, spec.label("spec")).where(spec.contains(BLOB), _reads_its_files())
    naming = naming.order_by(jobs.c.id).limit(BATCH)
    while rows := connection.execute(naming.where(jobs.c.id > after)).all():
        yield ((row.project, digest) for row in rows for digest in _NAMED.findall(row.spec))
        after = rows[-1].id


def _pairs(connection: Connection, query: Select[Any]) -> list[tuple[Any, Any]]:
    return [(first, second) for first, second in connection.execute(query)]


def _blobs(files: FileStore) -> Iterator[Path]:
    for folder in (files.folder / "blobs").glob("[0-9a-f][0-9a-f]"):
        yield from _matching(folder, _SHA256)


def _attempts(folder: Path) -> Iterator[_Attempt]:
    for attempt in _matching(folder, _FENCE):
        yield _Attempt(attempt, int(attempt.name), sorted(attempt.glob("*.pt")))


def _matching(folder: Path, name: re.Pattern[str]) -> Iterator[Path]:
    """Return the entries of a folder whose names the service has given. It must not delete any others."""
    return (path for path in sorted(folder.glob("*")) if name.fullmatch(path.name))


def _moved_at(path: Path) -> float:
    """Return when a file was last renamed or modified. A rename changes the ctime only."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return float("inf")
    return max(status.st_mtime, status.st_ctime)


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _remove_tree(folder: Path) -> bool:
    shutil.rmtree(folder)
    return True


def _batches(items: Iterator[T], size: int = BATCH) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
