"""Removes what nobody needs any more, and never what a row still needs.

    blobs         that no row names: untouched for `after_s` they go to the trash, and after as long again for good
    checkpoints   of jobs that succeeded, of others `checkpoints_s` after their end, and files that no row can name
    logs          of jobs that were deleted
    uploads       that nobody touched for `uploads_s`, row and file; what they became is a blob like any other
    temporaries   left by killed processes

Why no blob that is needed is lost. Who wants to name one in a row has just put it, or has asked for it, and both make
it young; whoever asks for one in the trash gets it back. So a blob is removed only `after_s` after anybody could have
met it, when all who did have committed their rows or given up; and rows are asked once more before. All rows are read
as of one moment, so that a name on its way from one row to another is not missed. In between, a row may name a blob
that lies in the trash: each look brings such a one back, as does everybody who reads it. That needs no lock, so it
holds for any number of collectors, and for one that is killed at any line.

Why no checkpoint is: an attempt that has lost its fence, or whose job is not running, can name no file any more. Its
files are listed first, the fence is read next and the rows last; what no row names then, none ever will.

A database that has not collected for `after_s` may be the wrong one: it names nothing. What it does not know is spared
until then, apart from moves to the trash.
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
from typing import Self, TypeVar

from sqlalchemy import Connection, Text, cast, select

from base.errors import DatabaseUnavailable, StorageFull
from base.failpoints import failpoint
from base.files import files_in, modified_at
from base.jobs import TERMINAL
from store import checkpoints, collections, uploads
from store.blobs import BlobStore
from store.database import Database
from store.errors import UploadBusy
from store.settings import Settings
from store.tables import artifacts, datasets, jobs, models
from store.tables import checkpoints as checkpoint_rows
from store.tables import uploads as upload_rows
from store.usage import measured

T = TypeVar("T")

Removed = dict[str, dict[str, int]]
"""By kind, `count` and `bytes`."""

BATCH = 200
FEW = 25
"""Jobs that are written in one transaction."""
PAUSE_S = 0.12
_BLOB = "blob:sha256:"
_NAMED = re.compile(_BLOB + "([0-9a-f]{64})")
_SHA256 = re.compile("[0-9a-f]{64}")
_JOB = re.compile("job_[0-9a-z]{24}")
_FENCE = re.compile("[0-9]+")
_UPLOAD = re.compile("up_[0-9a-z]{24}")


@dataclass(frozen=True)
class Retention:
    """For how long what may be needed again is kept, in seconds."""

    after_s: float
    checkpoints_s: float
    uploads_s: float

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.collect_after_s, settings.retain_checkpoints_s, settings.retain_uploads_s)


class Stopped(Exception):
    """Whoever collects was asked to leave; the next collection goes on."""


@dataclass
class Collector:
    """One collection. With `dry_run` it tells what it would remove, and touches nothing."""

    database: Database
    files: BlobStore
    retention: Retention
    dry_run: bool = False
    stopped: Callable[[], bool] = lambda: False
    tell: Callable[[str, Path, int], None] = lambda kind, path, bytes: None
    """Hears of each removal: kind, path, bytes."""
    removed: Removed = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """What could not be done; the rest was."""

    def run(self) -> None:
        """Once through everything. Raises DatabaseUnavailable, or Stopped."""
        with self.database.connect() as connection:
            knows_its_own = collections.known_for(connection, self.retention.after_s)
        # What frees room without needing any comes first.
        steps = [self.empty_trash, self.expire_checkpoints]
        steps += [self.tidy_checkpoints, self.tidy_logs, self.tidy_uploads] if knows_its_own else []
        for step in [*steps, self.expire_uploads, self.fill_trash, self.sweep_temporaries]:
            try:
                step()
            except DatabaseUnavailable:
                raise
            except (OSError, StorageFull) as error:
                self.faults.append(f"{step.__name__}: {error}")

    # ── blobs ──

    def empty_trash(self) -> None:
        """Bring back what a row names; remove for good what none has for long enough."""
        before = self._before(self.retention.after_s)
        named = named_digests(self.database)
        for path in self._each(_known(self.files.folder / "trash", _SHA256)):
            in_place = self.files.touched_at(path.name) > float("-inf")
            if path.name in named and not in_place:
                self._do("brought_back", path, self.files.bring_back, path.name)
            elif _moved_at(path) <= before:
                failpoint("collector.removing")
                self._do("blobs", path, _unlink, path)

    def fill_trash(self) -> None:
        """Move what no row names to the trash, then ask the rows again."""
        before = self._before(self.retention.after_s)
        named = named_digests(self.database)
        moved = []
        for path in self._each(_blobs(self.files)):
            if path.name not in named and self.files.touched_at(path.name) <= before:
                moved += self._do("to_trash", path, self.files.throw_away, path.name, before)
                failpoint("collector.moved")
        if moved and not self.dry_run:
            for sha256 in {path.name for path in moved} & named_digests(self.database):
                self._do("brought_back", self.files.trash_path(sha256), self.files.bring_back, sha256)

    # ── what belongs to jobs ──

    def expire_checkpoints(self) -> None:
        """Rows only: their files are then nobody's, and go with `tidy_checkpoints`."""
        with self.database.connect() as connection:
            ended = checkpoints.expired(connection, self.retention.checkpoints_s)
        for job_ids in self._each(_batches(iter([] if self.dry_run else ended), FEW)):
            with self._begin() as connection:
                for job_id in job_ids:
                    checkpoints.expire(connection, job_id, self.retention.checkpoints_s)
            failpoint("collector.expired")

    def tidy_checkpoints(self) -> None:
        for folders in _batches(_known(self.files.folder / "checkpoints", _JOB)):
            # Before the rows are read: what is written from now on is not looked at.
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
        for folders in _batches(_known(self.files.folder / "logs", _JOB)):
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
            # Not empty: it holds what is needed, or a temporary that is swept another day.
            with suppress(OSError):
                folder.rmdir()

    def _rows_of(self, job_ids: list[str]) -> "_Rows":
        with self.database.connect() as connection:
            # The fence before the names: an attempt that is past by now has named all that it ever will.
            found = connection.execute(select(jobs.c.id, jobs.c.status, jobs.c.fence).where(jobs.c.id.in_(job_ids)))
            known = {row.id: _Job(row.status, row.fence) for row in found}
            rows = checkpoint_rows.c
            named = select(rows.path).where(rows.job_id.in_(job_ids))
            if self.dry_run:
                named = named.where(rows.job_id.not_in(checkpoints.expired(connection, self.retention.checkpoints_s)))
            return _Rows(known, set(connection.scalars(named)))

    def _remove_unknown(self, kind: str, folder: Path) -> None:
        before = self._before(self.retention.after_s)
        if all(modified_at(path) <= before for path in [folder, *files_in(folder)]):
            self._do(kind, folder, _remove_tree, folder)

    # ── uploads and leftovers ──

    def expire_uploads(self) -> None:
        before = self._before(self.retention.uploads_s)
        with self.database.connect() as connection:
            old = uploads.older_than(connection, self.retention.uploads_s)
        for upload in self._each(old):
            path = self.files.upload_path(upload.id)
            if upload.status == "open":
                touched_at = modified_at(path) if path.exists() else float("-inf")
            else:
                touched_at = self.files.touched_at(str(upload.sha256))
            if touched_at <= before:
                with suppress(UploadBusy):
                    self._do("uploads", path, self._forget_upload, upload)

    def tidy_uploads(self) -> None:
        """Files whose upload is gone or complete."""
        before = self._before(self.retention.after_s)
        for paths in _batches(_known(self.files.folder / "uploads", _UPLOAD)):
            ours = upload_rows.c.id.in_([path.name for path in paths])
            with self.database.connect() as connection:
                known = set(connection.scalars(select(upload_rows.c.id).where(ours, upload_rows.c.status == "open")))
            for path in self._each(paths):
                if path.name not in known and modified_at(path) <= before:
                    self._do("uploads", path, _unlink, path)

    def sweep_temporaries(self) -> None:
        for path in self._each(self.files.temporaries()):
            self._do("temporaries", path, _unlink, path)

    def _forget_upload(self, upload: uploads.Upload) -> bool:
        with uploads.alone(self.files, upload.id):
            with self._begin() as connection:
                forgotten = uploads.forget(connection, upload)
            if forgotten:
                uploads.discard(self.files, upload.id)
            return forgotten

    # ── all of them ──

    def _do(self, kind: str, path: Path, act: Callable[..., bool], *given: object) -> list[Path]:
        """Act, unless this is a rehearsal, and write down what came of it: the path, where something did."""
        size = measured(path).bytes
        if not (self.dry_run or act(*given)):
            return []
        tally = self.removed.setdefault(kind, {"count": 0, "bytes": 0})
        tally["count"] += 1
        tally["bytes"] += size
        self.tell(kind, path, size)
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
        # SQLite's lock is not fair: who waits looks every tenth of a second, and heartbeats must have their turn.
        time.sleep(PAUSE_S)

    def _before(self, age_s: float) -> float:
        return self.files.now() - age_s


@dataclass(frozen=True)
class _Attempt:
    """A folder of checkpoints, as it was when it was listed."""

    folder: Path
    fence: int
    paths: list[Path]


@dataclass(frozen=True)
class _Job:
    status: str
    fence: int

    def is_past(self, fence: int) -> bool:
        """Whether the attempt of that fence can write no row any more."""
        return fence < self.fence or (fence == self.fence and self.status != "running")


@dataclass(frozen=True)
class _Rows:
    jobs: dict[str, _Job]
    paths: set[str]
    """Of checkpoints, as rows name them."""


def collect(collector: Collector, every_s: float) -> bool:
    """Run it, and keep a row of it; False where somebody began within `every_s`.

    On a full disk it runs without a row: it is the one to make room.
    """
    database = collector.database
    try:
        with database.begin() as connection:
            run = collections.begin(connection, socket.gethostname(), every_s)
    except StorageFull:
        collector.run()
        return True
    if run is None:
        return False
    try:
        collector.run()
    except Stopped:
        collector.faults.append("stopped before the end")
    finally:
        with database.begin() as connection:
            collections.end(connection, run, collector.removed, "; ".join(collector.faults) or None)
    return True


def named_digests(database: Database) -> set[str]:
    """Every digest that some row names, all as of one moment."""
    with database.connect() as connection:
        if not database.is_sqlite:
            connection.execution_options(isolation_level="REPEATABLE READ")
        return {digest for digests in _named(connection) for digest in digests if digest}


def _named(connection: Connection) -> Iterator[Iterable[str]]:
    for table in (artifacts, models, datasets, upload_rows):
        yield connection.scalars(select(table.c.sha256).distinct()).all()
    spec, after = cast(jobs.c.resolved_spec, Text), ""
    naming = select(jobs.c.id, spec.label("spec")).where(spec.contains(_BLOB)).order_by(jobs.c.id).limit(BATCH)
    while rows := connection.execute(naming.where(jobs.c.id > after)).all():
        yield (digest for row in rows for digest in _NAMED.findall(row.spec))
        after = rows[-1].id


def _blobs(files: BlobStore) -> Iterator[Path]:
    for folder in (files.folder / "blobs").glob("[0-9a-f][0-9a-f]"):
        yield from _known(folder, _SHA256)


def _attempts(folder: Path) -> Iterator[_Attempt]:
    for attempt in _known(folder, _FENCE):
        yield _Attempt(attempt, int(attempt.name), sorted(attempt.glob("*.pt")))


def _known(folder: Path, name: re.Pattern[str]) -> Iterator[Path]:
    """What is in a folder under a name that we give; nothing else is ours to remove."""
    return (path for path in sorted(folder.glob("*")) if name.fullmatch(path.name))


def _moved_at(path: Path) -> float:
    """When a file was renamed or touched, whichever came last. A rename leaves the mtime alone."""
    try:
        seen = path.stat()
    except FileNotFoundError:
        return float("inf")
    return max(seen.st_mtime, seen.st_ctime)


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
