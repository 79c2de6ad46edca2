"""One attempt at one job, top to bottom: prepare, supervise, publish, finish.

When `run_job` returns, the engine's process has ended and the scratch folder is removed, in every case. If another
attempt owns the job, nothing more is written. If the database cannot be reached, the next attempt repeats the work
from the last checkpoint.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from pydantic import ValidationError
from sqlalchemy import Connection

from base import figures
from base.clock import boottime
from base.data_cache import cache_of
from base.errors import (
    CODES,
    DeadlineExceeded,
    EngineError,
    EngineSilent,
    InputLost,
    Internal,
    OutOfMemory,
    StorageFull,
    TooManyFiles,
    WorkerLost,
)
from base.failpoints import failpoint
from base.files import DISK_FULL, make_folder, sha256_of, storage_full, too_many_files
from base.folders import LockedFolder
from base.references import BLOB, blobs_in, blobs_with_places
from base.text import STORED
from base.warning import WarningItem
from kdcore.catalog import DatasetFacts
from kdcore.protocol import KnownBefore, Order
from kdcore.spec import JobSpec, Known
from kdcore.spec.cost import JobCost, cost_rows
from kdcore.spec.measured import files_row, teacher_check_key
from store import checkpoints, events, lifecycle, registry, speeds
from store.artifacts import NewArtifact
from store.checkpoints import Checkpoint
from store.errors import LeaseLost
from store.lifecycle import Claim
from worker.context import UNAVAILABLE, WorkerContext
from worker.engine import Ending, EnginePool, EngineProcess, EngineRun
from worker.lease import LeaseKeeper
from worker.scratch import attempts_in_use, end_outlived, scratch_folder, write_session
from worker.writer import AnnouncedArtifact, AttemptWriter, DrainOver, LineWriter

log = logging.getLogger("distillery.attempt")

P = ParamSpec("P")
StopReason = Literal["cancel", "pause", "drain", "deadline", "silent", "lease_lost", "unproven", "broken"]
"""The reason why a training is stopped before its end. `unproven`: the database was out of reach for so long that
another attempt may own the job. `silent`: the engine has printed no line for long. `broken`: its lines cannot be
written."""
Outcome = Literal["progressed", "failed_early", "neither"]
"""The result of an attempt for its slot. `failed_early`: it failed before any progress, by a temporary error."""

LISTEN_S = 0.2
GIVE_BACK_EVERY_S = 0.5
BACK_OFF_GROWTH = 3
LONGEST_BACK_OFF_S = 600.0
HOST_LACKS = (StorageFull.code, TooManyFiles.code)
"""Errors that are not the job's: it waits until its host has disk space, or descriptors, again."""
STALE_FENCE = "job %s: fence %d is stale, another attempt owns the job"


def run_job(
    claim: Claim, context: WorkerContext, engines: EnginePool, claimed_at: float, on_renewed: Callable[[], None]
) -> Outcome:
    """Bring a claimed job to an end, or back to the queue. Raises nothing: an error becomes the job's error.

    `claimed_at` (`boottime`): just before the claim. `on_renewed` is called after each accepted heartbeat.
    """
    job = claim.job
    log.info("job %s: attempt %d begins on %s", job.id, claim.fence, engines.device.name)
    try:
        with (
            LeaseKeeper(claim, context, claimed_at, on_renewed) as lease,
            AttemptWriter(claim, context, lease.lost) as writer,
        ):
            attempt = Attempt(claim, context, engines, lease, writer)
            attempt.run()
            return attempt.outcome
    except LeaseLost:
        log.warning(STALE_FENCE, job.id, claim.fence)
        figures.attempt_ended("lost")
    except DrainOver:
        log.warning("job %s: left unfinished, the database could not be reached in time", job.id)
    except Exception as error:
        # No job may end its slot. If it is not given back here, its lease expires, and its attempt counts.
        log.exception("job %s: the attempt could not be brought to an end: %s", job.id, error)
        if (exhausted := too_many_files(error)) is None:
            return "failed_early"
        _give_back(claim, context, exhausted)
    return "neither"


def _give_back(claim: Claim, context: WorkerContext, error: EngineError) -> None:
    """Return a job to the queue, as soon as the database can be opened, without spending its attempt."""
    give_up_at = boottime() + context.settings.lease_s
    while boottime() < give_up_at and not context.drain.is_over:
        try:
            with context.database.begin() as connection:
                wait_s = context.options.room_wait_s
                lifecycle.postpone(connection, claim.job.id, claim.fence, error.as_dict(), wait_s)
            return
        except (*UNAVAILABLE, OSError) as unavailable:
            log.warning("job %s: cannot be given back yet: %s", claim.job.id, unavailable)
            time.sleep(GIVE_BACK_EVERY_S)


@dataclass
class Attempt:
    claim: Claim
    context: WorkerContext
    engines: EnginePool
    lease: LeaseKeeper
    writer: AttemptWriter
    stop_reason: StopReason | None = None
    artifacts: list[AnnouncedArtifact] = field(default_factory=list)
    failed: bool = False
    """True if the attempt failed by an error that another attempt may not have."""
    _deadline: float = float("inf")
    _kill_at: float = float("inf")

    @property
    def outcome(self) -> Outcome:
        if self.writer.has_progress:
            return "progressed"
        return "failed_early" if self.failed else "neither"

    def run(self) -> None:
        try:
            with scratch_folder(self.context.scratch, self.claim.job.id, self.claim.fence) as scratch:
                self._end_older_engines()
                arguments = self._prepare(scratch.path)
                ending = self._supervise(arguments, scratch)
                # The next engine imports while this one's results are published.
                self.engines.refill()
                self.writer.close()
                self._settle(ending)
        except (LeaseLost, DrainOver):
            raise
        except Exception as error:
            self._fail(self._engine_error(error).as_dict())

    def _engine_error(self, error: Exception) -> EngineError:
        """Return the job's error for an exception of the worker."""
        if (exhausted := too_many_files(error)) is not None:
            return exhausted
        if isinstance(error, EngineError):
            return error
        if isinstance(error, OSError):
            return _as_engine_error(error)
        log.error("job %s: the worker failed", self.claim.job.id, exc_info=error)
        return Internal(f"the worker failed: {type(error).__name__}: {error}")

    # ── prepare ──

    def _end_older_engines(self) -> None:
        """End engines of earlier attempts at this job that live on this host."""
        for older, lock in attempts_in_use(self.context.scratch).items():
            if older.job_id == self.claim.job.id and older.fence < self.claim.fence:
                end_outlived(older, lock)

    def _prepare(self, folder: Path) -> list[str]:
        """Return the engine's arguments: the spec, each input by its digest, and the newest undamaged checkpoint."""
        self._assert_mounted("checkpoints", self.claim.checkpoints)
        resume = self._newest_undamaged()
        digests = inputs(self.claim.job.resolved_spec, resumed=resume is not None)
        self._assert_mounted("blobs", digests)
        spec = folder / "spec.json"
        spec.write_text(json.dumps(self.claim.job.resolved_spec))
        out = folder / "out"
        out.mkdir()
        cache = cache_of(self.context.cache, self.claim.job.project)
        make_folder(cache)
        known = folder / "known.json"
        warnings = [WarningItem(**warning) for warning in self.claim.job.warnings]
        KnownBefore(warnings, self._teacher_check()).write(known)
        arguments = [str(spec), "--out", str(out), "--cache", str(cache), "--known", str(known)]
        arguments += ["--cache-max-bytes", str(self.context.settings.cache_max_bytes)]
        arguments += ["--teacher-cache-max-bytes", str(self.context.options.teacher_cache_max_bytes)]
        for digest in digests:
            arguments += ["--input", f"{BLOB}{digest}={self._input(digest)}"]
        if resume is not None:
            arguments += ["--resume", str(resume)]
        return arguments

    def _teacher_check(self) -> dict[str, Any] | None:
        """Return the check of the same teacher on the same data by an earlier job of this project, with its key."""
        job = self.claim.job
        key = teacher_check_key(job.resolved_spec)
        if key is None or self.claim.checkpoints:
            return None
        try:
            with self.context.database.begin() as connection:
                figures = registry.get_measurement(connection, job.project, "evaluation", key)
        except UNAVAILABLE as error:
            log.warning("job %s: its teacher will be measured again: %s", job.id, error)
            return None
        return None if figures is None else {**figures, "key": key}

    def _assert_mounted(self, kind: str, needed: Sequence[object]) -> None:
        """Raise an error if the folder of these files is missing: its disk is not mounted, no file is lost."""
        if needed and not (self.context.files.folder / kind).is_dir():
            raise StorageFull(
                f"the file store at {self.context.files.folder} has no folder {kind}: is it mounted?",
                "mount it, then the job continues",
            )

    def _input(self, digest: str) -> Path:
        path = self.context.files.path(digest)
        fault = None
        if not path.is_file():
            fault = "is not in the file store any more"
        elif sha256_of(path) != digest:
            fault = "is damaged on disk"
        if fault is None:
            return path
        places = [place for place, named in blobs_with_places(self.claim.job.resolved_spec) if named == digest]
        text = f"the input {BLOB}{digest} ({', '.join(places)} in the resolved spec) {fault}"
        raise InputLost(text, hint="upload the same file again, then retry the job")

    def _newest_undamaged(self) -> Path | None:
        for checkpoint in self.claim.checkpoints:
            path = self.context.files.folder / checkpoint.path
            fault = _fault(path, checkpoint)
            if fault is None:
                return path
            self._discard(checkpoint, f"the checkpoint of step {checkpoint.step} {fault}: an earlier one is used")
        return None

    def _discard(self, damaged: Checkpoint, reason: str) -> None:
        def discard(connection: Connection) -> None:
            checkpoints.delete_broken(connection, self.claim.job.id, self.claim.fence, damaged, reason)

        self.writer.commit(discard)

    # ── supervise ──

    def _supervise(self, arguments: list[str], scratch: LockedFolder) -> Ending | None:
        """Run the engine to its end. Returns None if no engine got the order, because the job had to stop before."""
        self._deadline = _deadline(self.claim, self.context.settings.lease_s)
        self.stop_reason = self._reason_to_stop()
        if self._must_stop:
            return None
        order = Order(arguments, str(scratch.path), {"TMPDIR": str(scratch.path)})
        ready = self.engines.take()
        if ready is not None:
            ending, began = self._run_engine(ready, order, scratch)
            if began or self._must_stop:
                return ending
            log.warning("job %s: the engine that was ready did not begin; starting another one", self.claim.job.id)
        ending, _ = self._run_engine(self.engines.start(self.lease.deadline), order, scratch)
        return ending

    @property
    def _must_stop(self) -> bool:
        return self.stop_reason is not None or self.lease.lost.is_set()

    def _run_engine(self, process: EngineProcess, order: Order, scratch: LockedFolder) -> tuple[Ending, bool]:
        """Run one engine. Returns how it ended, and whether it had begun."""
        log_path = self.context.files.log_path(self.claim.job.id, self.claim.fence)
        most_bytes = self.context.engine_memory_bytes
        with process, EngineRun(process, order, log_path=log_path, lock=scratch.lock, most_bytes=most_bytes) as run:
            write_session(scratch, process.pid)
            failpoint("engine.started")
            self.lease.attach(process)
            try:
                return self._listen(run, scratch.path / "out"), run.began
            finally:
                self.lease.attach(None)

    def _listen(self, run: EngineRun, out: Path) -> Ending:
        lines_to_rows = LineWriter(self.claim, self.context, self.writer, out)
        self.artifacts = lines_to_rows.artifacts
        more = True
        while more:
            lines, more = run.lines(LISTEN_S)
            for line in lines:
                lines_to_rows.write(line)
            self._steer(run)
        return run.ending()

    def _steer(self, run: EngineRun) -> None:
        """Request a stop if there is a reason. Kill an engine that does not stop in time, or must not run any more."""
        if self.lease.lost.is_set():
            self.stop_reason = self.stop_reason or "lease_lost"
            run.process.kill()
        elif self.lease.unproven:
            self.stop_reason = self.stop_reason or "unproven"
            run.process.kill()
        is_silent = run.began and run.silent_s > self.context.options.engine_silence_s
        if self.stop_reason is None and (reason := "silent" if is_silent else self._reason_to_stop()):
            self.stop_reason = reason
            self._kill_at = boottime() + self.context.settings.stop_grace_s
            log.info("job %s: stopping the engine (%s)", self.claim.job.id, reason)
            run.process.request_stop()
        elif self.stop_reason == "pause" and self.lease.requested == "cancel":
            self.stop_reason = "cancel"
        if run.is_overdue or boottime() > self._kill_at:
            run.process.kill()

    def _reason_to_stop(self) -> StopReason | None:
        if self.writer.error is not None:
            return "broken"
        if self.lease.requested == "cancel":
            return "cancel"
        if self.lease.requested == "pause":
            return "pause"
        if self.context.drain.requested:
            return "drain"
        return "deadline" if boottime() > self._deadline else None

    # ── publish ──

    def _publish(self, ending: Ending) -> None:
        """Store the files, then make them and the success visible in one transaction."""
        self._commit("phase.committed", lifecycle.set_phase, to="publishing")
        stored = []
        for artifact in self.artifacts:
            blob = self.context.files.put_file(artifact.path)
            if blob.sha256 != artifact.sha256:
                raise Internal(f"the artifact {artifact.name} differs from what the engine announced")
            stored.append(NewArtifact(artifact.name, blob.sha256, blob.bytes, artifact.media_type))
        failpoint("publish.stored")
        report = (ending.last_line or {}).get("report") or {}
        measured = sorted(self._measured(report), key=lambda one: one[:2])

        def succeed(connection: Connection, job_id: str, fence: int) -> bool:
            done = lifecycle.finish_succeeded(connection, job_id, fence, report, stored)
            # Sorted: two jobs that write the same rows must not wait for each other.
            for kind, key, found in measured if done else ():
                registry.put_measurement(connection, self.claim.job.project, kind, key, found)
            return done

        self._commit("finish_succeeded.committed", succeed)
        figures.job_succeeded(report)
        # Jobs may have waited for this one's student.
        self.context.wake_workers()

    def _measured(self, report: dict[str, Any]) -> Iterator[tuple[registry.Measured, str, dict[str, Any]]]:
        """Yield what the job has measured for later ones: kind, key and figures."""
        job = self.claim.job
        for key, cost in self._cost(report).items():
            yield "cost", key, cost
        if job.kind == "benchmark":
            yield "benchmark", job.resolved_spec["key"], {"job": job.id, **report}
        elif (files := files_row(job.id, job.resolved_spec, report)) is not None:
            yield "files", speeds.key_of_files(job.id), files

    def _cost(self, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what the job has cost, by key: the estimates of later ones are made of it. No job fails for that."""
        if "cost" not in report:
            return {}
        try:
            cost, dataset = JobCost.model_validate(report["cost"]), DatasetFacts.model_validate(report["dataset"])
            return cost_rows(
                JobSpec.model_validate(self.claim.job.resolved_spec, context=STORED), Known(dataset=dataset), cost
            )
        except (KeyError, ValidationError) as error:
            log.warning("job %s: the cost in its report cannot be kept: %s", self.claim.job.id, error)
            return {}

    # ── finish ──

    def _settle(self, ending: Ending | None) -> None:
        """Write how the attempt ended. If the engine was done, the job succeeds; else a requested action is applied."""
        reason = self.stop_reason
        if self.lease.lost.is_set():
            raise LeaseLost(self.claim.job.id, self.claim.fence)
        if self.writer.error is not None:
            fault = Internal(f"the engine's lines could not be written: {self.writer.error}")
            self._fail((too_many_files(self.writer.error) or fault).as_dict())
        elif ending is not None and ending.how == "done":
            self._publish(ending)
        elif reason == "deadline":
            self._fail(DeadlineExceeded("the job took longer than it was allowed to").as_dict())
        elif reason == "cancel":
            self._commit("finish_cancelled.committed", lifecycle.finish_cancelled)
            figures.attempt_ended("cancelled")
        elif ending is not None and ending.how == "error":
            self._fail(_reported_error(ending))
        elif reason == "silent":
            self._fail(self._silence().as_dict())
        elif reason is not None:
            self._commit(
                "release.committed", lifecycle.release, reason=reason, to="paused" if reason == "pause" else "queued"
            )
            self.context.wake_workers()
            figures.attempt_ended("released")
        else:
            assert ending is not None, "without a reason to stop an engine was started"  # noqa: S101
            self._fail(_observed_error(ending), ending)

    def _silence(self) -> EngineSilent:
        silence_s = self.context.options.engine_silence_s
        hint = "the log of this attempt may say where; DISTILLERY_ENGINE_SILENCE_S is how long a worker waits"
        return EngineSilent(f"the engine printed no line for {silence_s:g} s, and was stopped", hint)

    def _fail(self, error: dict[str, Any], ending: Ending | None = None) -> None:
        """End the job, or requeue it while it has attempts and the error may pass. What the host lacks costs none."""
        job_id = self.claim.job.id
        self.writer.close()
        figures.attempt_ended("postponed" if error["code"] in HOST_LACKS else "failed")
        if error["code"] in HOST_LACKS:
            log.warning("job %s: waits: %s", job_id, error["message"])
            self._commit("postpone.committed", lifecycle.postpone, error=error, wait_s=self.context.options.room_wait_s)
            return
        self.failed = bool(error["retryable"])
        log.warning("job %s: %s: %s", job_id, error["code"], error["message"])
        if ending is not None:
            hint = "see /logs of this attempt; the event has the log's last lines"
            warning = WarningItem("engine_ended", "", ending.message, hint)
            observed = {"how": ending.how, "exit_code": ending.exit_code, "log": ending.log_tail}
            self._commit("append.committed", events.append_warning, warning=warning, more=observed)
        retry_in_s = self._back_off_s if self.failed else None
        self._commit("finish_failed.committed", lifecycle.finish_failed, error=error, retry_in_s=retry_in_s)

    def _commit(
        self,
        committed: str,
        move: Callable[Concatenate[Connection, str, int, P], object],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Commit a change of the job. `committed`: the failpoint after the commit."""

        def write(connection: Connection) -> None:
            # False: the change is not allowed any more. Changes that return nothing raise LeaseLost themselves.
            if move(connection, self.claim.job.id, self.claim.fence, *args, **kwargs) is False:
                raise LeaseLost(self.claim.job.id, self.claim.fence)

        self.writer.commit(write, committed)

    @property
    def _back_off_s(self) -> float:
        growth = BACK_OFF_GROWTH ** (self.claim.job.attempts_without_progress - 1)
        return float(min(self.context.options.back_off_s * growth, LONGEST_BACK_OFF_S))


def inputs(resolved_spec: dict[str, Any], *, resumed: bool) -> list[str]:
    """Return the digests of the files that an attempt reads. A checkpoint of the job holds what its students started
    from, so that a resumed job does not need those files. A job that names another one's whole spec (`distillation`)
    reads only its data."""
    left_out = ("student", "assistants") if resumed else ()
    spec = {name: value for name, value in resolved_spec.items() if name not in left_out}
    if "distillation" in spec:
        spec["distillation"] = spec["distillation"].get("dataset")
    return sorted(set(blobs_in(spec)))


def _fault(path: Path, checkpoint: Checkpoint) -> str | None:
    """Return the reason why a checkpoint cannot be used, or None."""
    if not path.is_file():
        return "is gone"
    return None if sha256_of(path) == checkpoint.sha256 else "is damaged"


def _deadline(claim: Claim, lease_s: float) -> float:
    """Return the job's own deadline on this host's clock (`boottime`)."""
    job = claim.job
    if job.deadline_at is None or job.lease_until is None:
        return float("inf")
    claimed_at = job.lease_until - lease_s  # on the database's clock, as is `deadline_at`
    return boottime() + job.deadline_at - claimed_at


def _reported_error(ending: Ending) -> dict[str, Any]:
    """Return the error that the engine reported; an unknown code becomes `internal`."""
    line = ending.last_line or {}
    message, hint = str(line.get("message") or "the engine failed"), line.get("hint")
    code = line.get("code") if line.get("code") in CODES else Internal.code
    retryable = bool(line.get("retryable"))
    return {"code": code, "message": message, "retryable": retryable, "hint": None if hint is None else str(hint)}


def _observed_error(ending: Ending) -> dict[str, Any]:
    """Return the error of an engine that ended without reporting one, with the last line that it printed."""
    message = f"{ending.message}; it last printed: {ending.log_tail[-1]}" if ending.log_tail else ending.message
    match ending.how:
        case "out_of_memory":
            error: EngineError = OutOfMemory(message, hint="a smaller training.batch_size needs less")
        case "over_memory":
            # Another attempt would take as much.
            needs_less = "a smaller training.batch_size, image_size or network needs less"
            return OutOfMemory(ending.message, hint=needs_less).as_dict() | {"retryable": False}
        case "crashed":
            error = Internal(message, hint="the log of this attempt has more")
        case _:
            error = WorkerLost(message, hint="the log of this attempt has more")
    return error.as_dict()


def _as_engine_error(error: OSError) -> EngineError:
    if error.errno in DISK_FULL:
        return storage_full(error)
    return Internal(f"the worker failed: {error}")
