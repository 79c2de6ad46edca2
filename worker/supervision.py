"""The engine while it runs: its lines go to the table, wishes go to it, and a deaf one is killed."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection

from base.clock import boottime
from base.errors import StorageFull
from base.failpoints import failpoint
from kdcore.protocol import Order
from store import checkpoints, events, lifecycle, metrics
from store.errors import BlobMismatch
from store.lifecycle import Claim
from worker.child import Child, Ending, Line
from worker.desk import Desk
from worker.engines import Engines
from worker.heart import Heart
from worker.ledger import Ledger
from worker.scratch import Scratch
from worker.session import Session

log = logging.getLogger("distillery.supervision")

LISTEN_S = 0.2
CHECKPOINTS_KEPT = 2

Why = Literal["cancel", "pause", "drain", "deadline", "unproven", "broken"]
"""Why a training is stopped although it has not ended."""


@dataclass(frozen=True)
class Announced:
    """A file that the engine says it made."""

    name: str
    path: Path
    sha256: str
    media_type: str


class Supervision:
    """Of one engine, in one scratch folder. `why` and `artifacts` tell afterwards what came of it."""

    def __init__(
        self, claim: Claim, desk: Desk, engines: Engines, heart: Heart, ledger: Ledger, scratch: Scratch
    ) -> None:
        self._claim, self._desk, self._engines, self._heart, self._ledger = claim, desk, engines, heart, ledger
        self._scratch = scratch
        self._out = (scratch.folder / "out").resolve()
        self._ends_at = _ends_at(claim, desk)
        self._kill_at: float | None = None
        self.why: Why | None = None
        self.artifacts: list[Announced] = []

    def run(self, arguments: list[str]) -> Ending | None:
        """Until the engine has ended. None: it was given no order, because the job was to be stopped already."""
        self.why = self._reason_to_stop()
        if self._must_stop:
            return None
        folder = str(self._scratch.folder)
        order = Order(arguments, folder, {"TMPDIR": folder})
        waiting = self._engines.take()
        if waiting is not None:
            ending, began = self._hear(waiting, order)
            if began or self._must_stop:
                return ending
            log.warning("job %s: the engine that waited did not begin, another one is started", self._claim.job.id)
        ending, _ = self._hear(self._engines.start(self._heart.deadline), order)
        return ending

    @property
    def _must_stop(self) -> bool:
        return self.why is not None or self._heart.lost.is_set()

    def _hear(self, session: Session, order: Order) -> tuple[Ending, bool]:
        """How the engine of this session ended, and whether it had begun."""
        log_path = self._desk.files.log_path(self._claim.job.id, self._claim.fence)
        with session, Child(session, order, log_path=log_path, lock=self._scratch.lock) as child:
            self._scratch.note(session.pid)
            failpoint("engine.started")
            self._heart.keep(session)
            try:
                return self._listen(child), child.began
            finally:
                self._heart.keep(None)

    def _listen(self, child: Child) -> Ending:
        more = True
        while more:
            lines, more = child.lines(LISTEN_S)
            for line in lines:
                self._take(line)
            self._steer(child)
        return child.ending()

    def _steer(self, child: Child) -> None:
        """Ask it to stop when there is a reason to; kill it when it does not hear, or must not run any more."""
        if self._heart.lost.is_set() or self._heart.unproven:
            self.why = self.why or "unproven"
            child.session.kill()
        if self.why is None and (why := self._reason_to_stop()):
            self.why = why
            self._kill_at = boottime() + self._desk.settings.stop_grace_s
            log.info("job %s: stopping the engine (%s)", self._claim.job.id, why)
            child.session.ask_to_stop()
        elif self.why == "pause" and self._heart.requested == "cancel":
            self.why = "cancel"
        if child.is_overdue or (self._kill_at is not None and boottime() > self._kill_at):
            child.session.kill()

    def _reason_to_stop(self) -> Why | None:
        if self._ledger.error is not None:
            return "broken"
        if self._heart.requested == "cancel":
            return "cancel"
        if self._heart.requested == "pause":
            return "pause"
        if self._desk.drain.asked:
            return "drain"
        return "deadline" if boottime() > self._ends_at else None

    def _take(self, line: Line) -> None:
        """One line of the engine. A line that lacks what its event promises is no reason to stop a training."""
        try:
            match line["event"]:
                case "phase":
                    self._phase(str(line["phase"]))
                case "progress":
                    self._ledger.progress({key: value for key, value in line.items() if key != "event"})
                case "metric":
                    self._metric(str(line["trial"]), int(line["step"]), line.get("epoch"), dict(line["values"]))
                case "checkpoint":
                    self._checkpoint(int(line["step"]), self._inside(line["path"]), str(line["sha256"]))
                case "artifact":
                    self._artifact(line)
                case "warning":
                    self._warn(str(line["code"]), str(line["message"]))
        except (KeyError, TypeError, ValueError) as error:
            log.warning("job %s: a line of the engine is not understood: %r", self._claim.job.id, error)

    def _phase(self, phase: str) -> None:
        def write(connection: Connection) -> list[Path]:
            lifecycle.phase(connection, self._claim.job.id, self._claim.fence, phase)
            return []

        self._ledger.write(write)

    def _metric(self, trial: str, step: int, epoch: float | None, values: dict[str, float | None]) -> None:
        def write(connection: Connection) -> list[Path]:
            metrics.record(
                connection, self._claim.job.id, self._claim.fence, trial=trial, step=step, epoch=epoch, values=values
            )
            return []

        self._ledger.write(write)

    def _checkpoint(self, step: int, path: Path, digest: str) -> None:
        """First the file, whole and durable, then its row. One that cannot be kept costs a warning, no more."""
        job, fence, files = self._claim.job, self._claim.fence, self._desk.files
        try:
            blob = files.put_checkpoint(job.id, fence, step, path, digest)
        except FileNotFoundError:
            # The engine keeps the last two; it was faster than we were, and newer ones follow.
            return
        except (BlobMismatch, StorageFull, OSError) as error:
            self._warn("checkpoint_not_kept", f"the checkpoint of step {step} was not kept: {error}")
            return
        failpoint("checkpoint.stored")
        stored = files.relative(files.checkpoint_path(job.id, fence, step))

        def write(connection: Connection) -> list[Path]:
            checkpoints.record(connection, job.id, fence, step=step, sha256=blob.sha256, bytes=blob.bytes, path=stored)
            forgotten = checkpoints.superseded(connection, job.id, CHECKPOINTS_KEPT)
            return [files.folder / old.path for old in forgotten]

        self._ledger.write(write)

    def _artifact(self, line: Line) -> None:
        name, media_type = str(line["name"]), str(line["media_type"])
        self.artifacts.append(Announced(name, self._inside(line["path"]), str(line["sha256"]), media_type))

    def _warn(self, code: str, message: str) -> None:
        def write(connection: Connection) -> list[Path]:
            said = {"code": code, "message": message}
            events.append(connection, self._claim.job.id, self._claim.fence, "warning", said)
            return []

        self._ledger.write(write)

    def _inside(self, path: str) -> Path:
        """A file of the engine's own folder; ValueError for any other: it may have read something hostile."""
        found = (self._out / path).resolve()
        if not found.is_relative_to(self._out):
            raise ValueError(f"{path!r} is not in the engine's folder")
        return found


def _ends_at(claim: Claim, desk: Desk) -> float:
    """The job's own deadline on our clock. The claim says what time it was in the database's."""
    job = claim.job
    if job.deadline_at is None or job.lease_until is None:
        return float("inf")
    return boottime() + job.deadline_at - (job.lease_until - desk.settings.lease_s)
