"""One attempt at one job, top to bottom: prepare, supervise, publish, finish.

Whatever happens, the engine's process has ended and the scratch folder is gone when `run_job` returns. What it could
not write because another attempt owns the job is nobody's loss; what it could not write because the table was out of
reach is done again by whoever takes the job next, from the last checkpoint.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from base.errors import DeadlineExceeded, EngineError, Internal, OutOfMemory, StorageFull, WorkerLost
from base.failpoints import failpoint
from base.files import DISK_FULL, sha256
from store import checkpoints, events, lifecycle
from store.artifacts import NewArtifact
from store.checkpoints import Checkpoint
from store.errors import LeaseLost
from store.lifecycle import Claim
from worker import scratch
from worker.child import Ending
from worker.desk import Desk
from worker.engines import Engines
from worker.health import Sign
from worker.heart import Heart
from worker.ledger import GivenUp, Ledger
from worker.supervision import Announced, Supervision, Why

log = logging.getLogger("distillery.run_job")

BACK_OFF_GROWTH = 3
LONGEST_BACK_OFF_S = 600.0
BLOB = "blob:sha256:"
CODES = {error.code for error in EngineError.__subclasses__()}


def run_job(claim: Claim, desk: Desk, engines: Engines, claimed_at: float, proven: Callable[[], None]) -> Sign:
    """Bring a claimed job to an end, or back to the queue. Raises nothing: what goes wrong is the job's own story.

    Returns what it shows of the slot.
    `claimed_at`: the time (`boottime`) just before the claim. `proven`: told of every heartbeat that got through.
    """
    job = claim.job
    log.info("job %s: attempt %d begins on %s", job.id, claim.fence, engines.device.name)
    try:
        with Heart(claim, desk, claimed_at, proven) as heart, Ledger(claim, desk, heart.lost) as ledger:
            attempt = Attempt(claim, desk, engines, heart, ledger)
            attempt.run()
            return attempt.sign
    except LeaseLost:
        log.warning("job %s: fence %d is stale, another attempt owns the job", job.id, claim.fence)
    except GivenUp:
        log.warning("job %s: left unfinished, the table was out of reach until the end", job.id)
    except Exception as error:
        # Last resort, so that a slot outlives any job: the lease lapses, and the attempt counts.
        log.exception("job %s: the attempt could not be brought to an end: %s", job.id, error)
        return "sick"
    return "none"


@dataclass
class Attempt:
    claim: Claim
    desk: Desk
    engines: Engines
    heart: Heart
    ledger: Ledger
    failed: bool = False
    """In a way that another attempt may not."""

    @property
    def sign(self) -> Sign:
        if self.ledger.told_progress:
            return "sound"
        return "sick" if self.failed else "none"

    def run(self) -> None:
        try:
            with scratch.scratch_folder(self.desk.scratch, self.claim.job.id, self.claim.fence) as own:
                self._end_older()
                arguments = self._prepare(own.folder)
                supervision = Supervision(self.claim, self.desk, self.engines, self.heart, self.ledger, own)
                ending = supervision.run(arguments)
                # The next one imports while this one's results are published.
                self.engines.keep_one()
                self.ledger.close()
                self._settle(ending, supervision)
        except (LeaseLost, GivenUp):
            raise
        except EngineError as error:
            self._fail(error.as_dict())
        except OSError as error:
            self._fail(_as_engine_error(error).as_dict())
        except Exception as error:
            log.exception("job %s: the worker failed", self.claim.job.id)
            self._fail(Internal(f"the worker failed: {type(error).__name__}: {error}").as_dict())

    # ── prepare ──

    def _end_older(self) -> None:
        """An earlier engine of this job that lives on, on this host: its guard froze and its worker died."""
        for lock in scratch.held(self.desk.scratch):
            is_older = lock.job_id == self.claim.job.id and lock.fence < self.claim.fence
            if is_older and scratch.end(lock):
                log.warning("job %s: the engine of fence %d had outlived its lease, ended", lock.job_id, lock.fence)

    def _prepare(self, folder: Path) -> list[str]:
        """The engine's arguments, with inputs by digest and the newest checkpoint whose bytes are what they were."""
        digests = sorted(set(_digests(self.claim.job.resolved_spec)))
        self._assert_mounted("blobs", digests)
        self._assert_mounted("checkpoints", self.claim.checkpoints)
        spec = folder / "spec.json"
        spec.write_text(json.dumps(self.claim.job.resolved_spec))
        out = folder / "out"
        out.mkdir()
        self.desk.cache.mkdir(parents=True, exist_ok=True)
        arguments = [str(spec), "--out", str(out), "--cache", str(self.desk.cache)]
        for digest in digests:
            arguments += ["--input", f"{BLOB}{digest}={self._input(digest)}"]
        if resume := self._newest_whole():
            arguments += ["--resume", str(resume)]
        return arguments

    def _assert_mounted(self, kind: str, needed: Sequence[object]) -> None:
        """Where nothing is of the kind that a job needs, nothing is lost: its disk is away, and will be back."""
        if needed and not (self.desk.files.folder / kind).is_dir():
            raise StorageFull(
                f"the file store at {self.desk.files.folder} has no folder {kind}: is it mounted?",
                "mount it, then the job goes on",
            )

    def _input(self, digest: str) -> Path:
        path = self.desk.files.path(digest)
        if not path.is_file():
            raise Internal(f"the input {BLOB}{digest} is not in the file store", hint="upload it again, then retry")
        if sha256(path) != digest:
            raise Internal(f"the input {BLOB}{digest} is damaged on disk", hint="upload it again, then retry")
        return path

    def _newest_whole(self) -> Path | None:
        for checkpoint in self.claim.checkpoints:
            path = self.desk.files.folder / checkpoint.path
            fault = _fault(path, checkpoint)
            if fault is None:
                return path
            self._discard(checkpoint, f"the checkpoint of step {checkpoint.step} {fault}: an earlier one is used")
        return None

    def _discard(self, broken: Checkpoint, reason: str) -> None:
        def discard(connection: Connection) -> None:
            checkpoints.delete_broken(connection, self.claim.job.id, self.claim.fence, broken, reason)

        self.ledger.insist(discard)

    # ── publish and finish ──

    def _settle(self, ending: Ending | None, supervision: Supervision) -> None:
        """Say how it ended. A request is granted whatever the end; but who was done, and has told all, is done."""
        why = supervision.why
        if self.heart.lost.is_set():
            raise LeaseLost(self.claim.job.id, self.claim.fence)
        if self.ledger.error is not None:
            self._fail(Internal(f"what the engine said could not be written: {self.ledger.error}").as_dict())
        elif ending is not None and ending.how == "done":
            self._publish(ending, supervision.artifacts)
        elif why == "deadline":
            self._fail(DeadlineExceeded("the job took longer than it was allowed to").as_dict())
        elif why == "cancel":
            self._finish(lifecycle.finish_cancelled)
        elif ending is not None and ending.how == "error":
            self._fail(_told(ending))
        elif why is not None:
            self._release(why)
        else:
            assert ending is not None, "only a request keeps a training from starting"  # noqa: S101
            self._fail(_seen(ending), ending)

    def _publish(self, ending: Ending, announced: list[Announced]) -> None:
        """Files first, then one transaction that makes them and the success visible together."""
        self._finish(lifecycle.set_phase, to="publishing")
        stored = []
        for artifact in announced:
            blob = self.desk.files.put_file(artifact.path)
            if blob.sha256 != artifact.sha256:
                raise Internal(f"the artifact {artifact.name} is not what the engine announced")
            stored.append(NewArtifact(artifact.name, blob.sha256, blob.bytes, artifact.media_type))
        failpoint("publish.stored")
        report = (ending.last_line or {}).get("report") or {}
        self._finish(lifecycle.finish_succeeded, result=report, artifacts=stored)

    def _fail(self, error: dict[str, Any], ending: Ending | None = None) -> None:
        """A final error ends the job; another is tried again while attempts last; a full disk is waited out."""
        if error["code"] == StorageFull.code:
            self._postpone(error)
            return
        self.failed = bool(error["retryable"])
        retry_in_s = self._back_off_s() if self.failed else None
        log.warning("job %s: %s: %s", self.claim.job.id, error["code"], error["message"])
        self.ledger.close()
        if ending is not None:
            self._finish(events.append_note, type="warning", data=_evidence(ending))
        self._finish(lifecycle.finish_failed, error=error, retry_in_s=retry_in_s)

    def _postpone(self, error: dict[str, Any]) -> None:
        log.warning("job %s: waits for room: %s", self.claim.job.id, error["message"])
        self.ledger.close()
        self._finish(lifecycle.postpone, error=error, wait_s=self.desk.options.room_wait_s)

    def _back_off_s(self) -> float:
        growth = BACK_OFF_GROWTH ** (self.claim.attempts_without_progress - 1)
        return float(min(self.desk.options.back_off_s * growth, LONGEST_BACK_OFF_S))

    def _release(self, why: Why) -> None:
        to = "paused" if why == "pause" else "queued"
        self._finish(lifecycle.release, reason=why, to=to)
        self.desk.ring()

    def _finish(self, move: Any, **details: Any) -> None:
        def write(connection: Connection) -> None:
            # A move that is no longer ours to make says False; `phase` says nothing, and raises instead.
            if move(connection, self.claim.job.id, self.claim.fence, **details) is False:
                raise LeaseLost(self.claim.job.id, self.claim.fence)

        self.ledger.insist(write, f"{move.__name__}.committed")


def _digests(value: Any) -> Iterator[str]:
    """Every blob that a resolved spec names, wherever it stands."""
    if isinstance(value, str) and value.startswith(BLOB):
        yield value.removeprefix(BLOB)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _digests(part)
    elif isinstance(value, list):
        for part in value:
            yield from _digests(part)


def _fault(path: Path, checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    if not path.is_file():
        return "is gone"
    return None if sha256(path) == checkpoint.sha256 else "is damaged"


def _told(ending: Ending) -> dict[str, Any]:
    """The engine's own error, held to the closed list of codes."""
    line = ending.last_line or {}
    message, hint = str(line.get("message") or "the engine failed"), line.get("hint")
    code = line.get("code") if line.get("code") in CODES else Internal.code
    retryable = bool(line.get("retryable"))
    return {"code": code, "message": message, "retryable": retryable, "hint": None if hint is None else str(hint)}


def _seen(ending: Ending) -> dict[str, Any]:
    """An error for an engine that ended without naming one, with the last that it printed."""
    words = f"{ending.message}; its last words: {ending.log_tail[-1]}" if ending.log_tail else ending.message
    match ending.how:
        case "out_of_memory":
            error: EngineError = OutOfMemory(words, hint="a smaller training.batch_size needs less")
        case "crashed":
            error = Internal(words, hint="the log of this attempt says more")
        case _:
            error = WorkerLost(words, hint="the log of this attempt says more")
    return error.as_dict()


def _evidence(ending: Ending) -> dict[str, Any]:
    """For the feed: what was seen from outside."""
    seen = {"how": ending.how, "exit_code": ending.exit_code, "log": ending.log_tail}
    return {"code": "engine_ended", "message": ending.message, **seen}


def _as_engine_error(error: OSError) -> EngineError:
    if error.errno in DISK_FULL:
        return StorageFull(f"no room to write: {error.strerror}", "free some space, then try again")
    return Internal(f"the worker failed: {error}")
