"""The writer of one attempt: it puts the engine's lines into the database, in order, in batches, under the fence.

A database that cannot be reached delays the writes; it does not stop the training.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from sqlalchemy import Connection

from base.errors import StorageFull
from base.failpoints import failpoint
from base.warning import WarningItem
from base.wire import TeacherCheck
from kdcore.protocol import CHECKPOINTS_KEPT
from store import alerts, attempts, checkpoints, events, lifecycle, metrics
from store.errors import BlobMismatch, LeaseLost
from store.lifecycle import Claim
from worker.context import UNAVAILABLE, WorkerContext
from worker.engine import Line

log = logging.getLogger("distillery.writer")

P = ParamSpec("P")
T = TypeVar("T")
Write = Callable[[Connection], Iterable[Path]]
"""A function that writes rows and returns the files that may be deleted after the commit."""

BATCH_S = 0.2
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0


class DrainOver(Exception):
    """The worker has to end before the database can be reached; the next attempt repeats the work."""


class AttemptWriter:
    """Writes batches of rows from a thread of its own, so that a slow database never delays the training."""

    def __init__(self, claim: Claim, context: WorkerContext, lost: threading.Event) -> None:
        self._claim, self._context, self._lost = claim, context, lost
        self._waiting: list[Write] = []
        self._progress: dict[str, Any] | None = None
        self._has_grown = False
        self._furthest = (0.0, 0)
        self._batches = 0
        self._lock = threading.Lock()
        self._more = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer-{claim.job.id}", daemon=True)
        self.has_progress = False
        self.error: BaseException | None = None
        """An error that makes further writing useless, other than a lost lease."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, write: Write) -> None:
        with self._lock:
            self._waiting.append(write)
        self._more.set()

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Write the latest progress; an earlier one that is not written yet is dropped."""
        reached = (float(progress.get("percent") or 0), int(progress.get("step") or 0))
        with self._lock:
            self._progress = progress
            if reached > self._furthest:
                self._furthest, self._has_grown = reached, True
        self.has_progress = True
        self._more.set()

    def note_work(self) -> None:
        """Write that the attempt goes on with something that its progress does not count."""
        with self._lock:
            self._has_grown = True
        self._more.set()

    def close(self) -> None:
        """Wait until everything is written, or cannot be written any more."""
        self._closing.set()
        self._more.set()
        self._thread.join()

    def commit(self, write: Callable[[Connection], T], committed: str = "lines.committed") -> T:
        """Write one transaction, exactly once, and try again until it is committed. Returns what `write` returns.

        Raises LeaseLost, or DrainOver if the worker has to end. Used by one thread at a time: the writer's own until
        it is closed, another one if nothing has been written yet. `committed`: the failpoint after the commit.
        """
        job_id, fence, wait_s = self._claim.job.id, self._claim.fence, FIRST_WAIT_S
        self._batches += 1
        while True:
            try:
                with self._context.database.begin() as connection:
                    # False: an earlier try, whose answer was lost, was committed. It has set `result`.
                    if attempts.begin_batch(connection, job_id, fence, self._batches):
                        result = write(connection)
                failpoint(committed)
                return result
            except UNAVAILABLE as error:
                log.warning("job %s: the database cannot be written, trying again: %s", job_id, error)
            if self._lost.is_set():
                raise LeaseLost(job_id, fence)
            if self._context.drain.is_over:
                raise DrainOver
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _run(self) -> None:
        try:
            while self._more.wait():
                self._more.clear()
                self._write_batch()
                if self._closing.is_set() and not self._waiting:
                    return
                # Wait after a write, not before it, so that the very first line is written at once.
                self._closing.wait(BATCH_S)
        except (LeaseLost, DrainOver):
            self._lost.set()
        except Exception as error:
            # Any exception: the attempt reads `error` and fails.
            log.exception("job %s: the engine's lines cannot be written", self._claim.job.id)
            self.error = error

    def _write_batch(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, []
            progress, self._progress = self._progress, None
            has_grown, self._has_grown = self._has_grown, False
        if not batch and progress is None and not has_grown:
            return
        job, fence = self._claim.job, self._claim.fence

        def write_all(connection: Connection) -> list[Path]:
            unused = [path for write in batch for path in write(connection)]
            if progress is not None or has_grown:
                lifecycle.set_progress(connection, job.id, fence, progress, has_grown=has_grown)
            return unused

        for path in self.commit(write_all):
            failpoint("checkpoint.superseded")
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                # No row names the file any more, and the collector tries again.
                log.warning("job %s: an old checkpoint cannot be deleted: %s", job.id, error)


@dataclass(frozen=True)
class AnnouncedArtifact:
    """A file that the engine has made and described in a line."""

    name: str
    path: Path
    sha256: str
    media_type: str


class LineWriter:
    """Writes each line of the engine as the row of its event. `out`: the engine's folder for its files."""

    def __init__(self, claim: Claim, context: WorkerContext, writer: AttemptWriter, out: Path) -> None:
        self._job_id, self._fence = claim.job.id, claim.fence
        self._files, self._writer, self._out = context.files, writer, out.resolve()
        self._alerts = alerts.asked(claim.job.resolved_spec)
        self.artifacts: list[AnnouncedArtifact] = []

    def write(self, line: Line) -> None:
        """Write one line. A line without a required field is logged; it does not stop the training."""
        try:
            match line["event"]:
                case "phase":
                    self._write(lifecycle.set_phase, to=str(line["phase"]))
                case "progress":
                    self._writer.write_progress({key: value for key, value in line.items() if key != "event"})
                case "metric":
                    step, epoch, values = int(line["step"]), line.get("epoch"), dict(line["values"])
                    trial = str(line["trial"])
                    self._write(metrics.record, trial=trial, step=step, epoch=epoch, values=values)
                    if self._alerts and trial == alerts.TRIAL:
                        self._write(alerts.see_metrics, self._alerts, step=step, epoch=epoch, values=values)
                case "working":
                    self._writer.note_work()
                case "checkpoint":
                    self._store_checkpoint(int(line["step"]), self._inside(line["path"]), str(line["sha256"]))
                case "artifact":
                    name, media_type = str(line["name"]), str(line["media_type"])
                    path, digest = self._inside(line["path"]), str(line["sha256"])
                    self.artifacts.append(AnnouncedArtifact(name, path, digest, media_type))
                case "teacher_check":
                    left_out = TeacherCheck.__optional_keys__ - line.keys()
                    kept = [name for name in TeacherCheck.__annotations__ if name not in left_out]
                    check = {name: line[name] for name in (*kept, "warnings")}
                    self._write(lifecycle.set_teacher_check, to=check, key=line["key"])
                case "weights_taken":
                    found = {key: value for key, value in line.items() if key != "event"}
                    self._write(events.append_finding, type="weights_taken", data=found)
                case "warning":
                    self._warn(WarningItem(**{name: line[name] for name in ("code", "pointer", "message", "hint")}))
        except (KeyError, TypeError, ValueError) as error:
            log.warning("job %s: a line of the engine cannot be read: %r", self._job_id, error)

    def _store_checkpoint(self, step: int, path: Path, digest: str) -> None:
        """Store the file first, then its row. A checkpoint that cannot be stored is only a warning."""
        try:
            blob = self._files.put_checkpoint(self._job_id, self._fence, step, path, digest)
        except FileNotFoundError:
            # The engine keeps its last files only. It has deleted this one already, and newer ones follow.
            return
        except (BlobMismatch, StorageFull, OSError) as error:
            text = f"the checkpoint of step {step} was not kept: {error}"
            self._warn(
                WarningItem("checkpoint_not_kept", "", text, "free some disk space; the next one is tried as usual")
            )
            return
        failpoint("checkpoint.stored")
        stored = self._files.relative(self._files.checkpoint_path(self._job_id, self._fence, step))

        def write(connection: Connection) -> list[Path]:
            checkpoints.record(
                connection,
                self._job_id,
                self._fence,
                step=step,
                sha256=blob.sha256,
                bytes=blob.bytes,
                path=stored,
            )
            unused = checkpoints.delete_superseded(connection, self._job_id, CHECKPOINTS_KEPT)
            return [self._files.folder / old.path for old in unused]

        self._writer.write(write)

    def _warn(self, warning: WarningItem) -> None:
        self._write(events.append_warning, warning=warning)

    def _write(
        self, record: Callable[Concatenate[Connection, str, int, P], object], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Write one row with a function of the store."""

        def write(connection: Connection) -> tuple[()]:
            record(connection, self._job_id, self._fence, *args, **kwargs)
            return ()

        self._writer.write(write)

    def _inside(self, path: str) -> Path:
        """Return the path of a file in the engine's folder. Raises ValueError for any other (hostile input)."""
        inside = (self._out / path).resolve()
        if not inside.is_relative_to(self._out):
            raise ValueError(f"{path!r} is not in the engine's folder")
        return inside
