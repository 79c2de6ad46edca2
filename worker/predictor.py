"""The predictions of a worker: a place of its own beside its slots, so that an image never waits for a training.

An engine runs the models on a CPU with one thread, as a child that is bounded in memory and time, like that of a job.
The first image starts one; another is then kept ready for KEEP_S after each image, so that a person who tries several
waits for the models alone.
"""

import json
import logging
import threading
from pathlib import Path
from typing import Any

from base.clock import boottime, jittered
from base.data_cache import cache_of
from base.errors import DeadlineExceeded, EngineError, Internal, OutOfMemory
from base.files import make_folder, sha256_of
from base.folders import LockedFolder, locked_folder, remove_abandoned
from base.memory import host_memory
from base.references import BLOB, FILE, blobs_in
from kdcore.protocol import Order
from store import predictions
from store.predictions import Claimed
from worker.context import UNAVAILABLE, WorkerContext
from worker.devices import Device
from worker.engine import Ending, EnginePool, EngineProcess, EngineRun
from worker.scratch import FOREIGN_AFTER_S

log = logging.getLogger("distillery.predictor")

DEVICE = Device("predictions", visible="", threads=1, threads_are_asked=True)
POLL_S = 1.0
"""The time between two polls. A wake-up message reaches only a worker with a free slot."""
LISTEN_S = 0.1
LIMIT_S = 60.0
"""The longest time of the models on one image, from the order on; published weights may be downloaded in it."""
ENDS_BY_S = 150.0
"""The longest time of one prediction, with the start of an engine; shorter than its lease."""
KEEP_S = 600.0
TIDY_EVERY_S = 300.0
ORPHAN_AFTER_S = 300.0
"""A picture without a row is deleted then: the row is written as soon as the picture has arrived, within a minute."""
MEMORY_BYTES = (1_000_000_000, 4_000_000_000)
"""What an engine may take at least and at most; between these a tenth of the host's memory."""
SCRATCH = "predictions"
"""The folder beside those of attempts: the sweep takes every folder there for an attempt's."""


class Predictor:
    """Claims predictions and answers them, one after the other, on a thread of its own."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._engines = EnginePool(context, DEVICE)
        self._scratch = context.settings.home / SCRATCH
        self._wake_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="predictor", daemon=True)
        self._keep_until = self._tidy_at = float("-inf")
        self._most_bytes = memory_bytes(context.engine_memory_bytes, host_memory())

    def start(self) -> None:
        self._thread.start()

    def wake_up(self) -> None:
        """Poll now."""
        self._wake_up.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end after a drain. Returns False if it has not ended in time."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._context.drain.requested:
            self._wake_up.clear()
            wait_s = self._context.settings.look_s
            try:
                wait_s = 0.0 if self.work() else min(POLL_S, wait_s)
                self._keep_or_end_engine()
            except UNAVAILABLE as error:
                log.debug("the database cannot be polled for predictions: %s", error)
            except Exception:
                # No fault of one prediction may end the thread, which answers all others.
                log.exception("a prediction could not be run")
            if wait_s:
                self._wake_up.wait(jittered(wait_s))
        self._engines.close()

    def _keep_or_end_engine(self) -> None:
        if boottime() < self._keep_until:
            self._engines.refill()
        else:
            self._engines.close()

    def work(self) -> bool:
        """Claim and answer one prediction. Returns False if there is none."""
        self._tidy()
        with self._context.database.connect() as connection:
            if not predictions.has_claimable(connection):
                return False
        with self._context.database.begin() as connection:
            claimed = predictions.claim(connection, self._context.owner)
        if claimed is None:
            return False
        self._keep_until = boottime() + KEEP_S
        self._answer(claimed)
        return True

    def _answer(self, claimed: Claimed) -> None:
        ends_by = boottime() + ENDS_BY_S
        answer: dict[str, Any] | None = None
        error: dict[str, Any] | None = None
        try:
            ending = self._run_engine(claimed, ends_by)
            if ending is None:
                with self._context.database.begin() as connection:
                    predictions.release(connection, claimed.id, self._context.owner)
                return
            if ending.how == "done":
                answer = (ending.last_line or {})["report"]
            else:
                error = error_of(ending)
        except EngineError as fault:
            error = fault.as_dict()
        except Exception as fault:
            # Whatever it is: a row without an end would be the first one for ever.
            log.exception("prediction %s: the worker failed", claimed.id)
            error = Internal(f"the worker failed: {type(fault).__name__}: {fault}").as_dict()
        if error is not None:
            log.info("prediction %s of job %s: %s: %s", claimed.id, claimed.job_id, error["code"], error["message"])
        with self._context.database.begin() as connection:
            predictions.finish(connection, claimed.id, self._context.owner, answer=answer, error=error)
        self._context.files.picture_path(claimed.id).unlink(missing_ok=True)

    def _run_engine(self, claimed: Claimed, ends_by: float) -> Ending | None:
        """Run the models. Returns None if the worker was asked to stop before the end."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        with locked_folder(self._scratch, f"{claimed.id}.1") as scratch:
            order = Order(self._prepare(claimed, scratch.path), str(scratch.path), {"TMPDIR": str(scratch.path)})
            process = self._engines.take() or self._engines.start(ends_by)
            process.extend(ends_by)
            return self._listen(process, order, scratch, ends_by)

    def _listen(self, process: EngineProcess, order: Order, scratch: LockedFolder, ends_by: float) -> Ending | None:
        log_path = scratch.path / "log"
        with (
            process,
            EngineRun(process, order, log_path=log_path, lock=scratch.lock, most_bytes=self._most_bytes) as run,
        ):
            more = True
            while more:
                _, more = run.lines(LISTEN_S)
                if run.began:
                    ends_by = min(ends_by, boottime() + LIMIT_S)
                if self._context.drain.requested:
                    process.kill()
                    return None
                if run.is_overdue or boottime() > ends_by:
                    process.kill()
                    run.ending()
                    raise DeadlineExceeded(f"the models took more than {LIMIT_S:g} s on the image")
            return run.ending()

    def _prepare(self, claimed: Claimed, folder: Path) -> list[str]:
        """Return the engine's arguments: the spec, and each input by its digest."""
        picture = self._context.files.picture_path(claimed.id)
        if not picture.is_file() or sha256_of(picture) != claimed.sha256:
            raise Internal("the image is gone or damaged", hint="send it again")
        # A model whose file was deleted since the job used it is left out of the answer; without the student is none.
        kept = {one: path for one in _others(claimed) if (path := self._context.files.path(one)).is_file()}
        kept[claimed.student] = self._input(claimed.student)
        spec = {
            "kind": "prediction",
            "image": f"{FILE}{picture}",
            "job": claimed.spec,
            "dataset": claimed.dataset,
            "student": f"{BLOB}{claimed.student}",
            "alone": f"{BLOB}{claimed.alone}" if claimed.alone in kept else None,
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        out, cache = folder / "out", cache_of(self._context.cache, claimed.project)
        out.mkdir()
        make_folder(cache)
        arguments = [str(folder / "spec.json"), "--out", str(out), "--cache", str(cache)]
        for digest, path in sorted(kept.items()):
            arguments += ["--input", f"{BLOB}{digest}={path}"]
        return arguments

    def _input(self, digest: str) -> Path:
        path = self._context.files.path(digest)
        if not path.is_file():
            raise Internal(f"the input {BLOB}{digest} is not in the file store", hint="is its disk mounted?")
        return path

    def _tidy(self) -> None:
        """Delete old rows and their pictures, and pictures without a row, from time to time."""
        if boottime() < self._tidy_at:
            return
        self._tidy_at = boottime() + TIDY_EVERY_S
        remove_abandoned(self._scratch, FOREIGN_AFTER_S)
        with self._context.database.begin() as connection:
            gone = predictions.expire(connection)
        for prediction_id in gone:
            self._context.files.picture_path(prediction_id).unlink(missing_ok=True)
        old = self._context.files.pictures(older_than_s=ORPHAN_AFTER_S)
        with self._context.database.connect() as connection:
            named = predictions.known(connection, [path.name for path in old])
        for path in old:
            if path.name not in named:
                path.unlink(missing_ok=True)


def _others(claimed: Claimed) -> set[str]:
    """Return the digests of the files of all models beside the student."""
    return {*blobs_in(claimed.spec.get("teacher")), *([claimed.alone] if claimed.alone else [])}


def memory_bytes(bound: int | None, host: int | None) -> int:
    """Return what an engine may take, where one of a job may take `bound` and the host has `host` bytes."""
    least, most = MEMORY_BYTES
    own = most if host is None else max(least, min(most, host // 10))
    return own if bound is None else min(own, bound)


def error_of(ending: Ending) -> dict[str, Any]:
    """Return the error of an engine that was not done: the one that it reported, or what was seen from outside."""
    if ending.how == "error":
        line = ending.last_line or {}
        return {name: line.get(name) for name in ("code", "message", "retryable", "hint")}
    match ending.how:
        case "out_of_memory" | "over_memory":
            hint = "a smaller image, or a smaller teacher, needs less"
            error: EngineError = OutOfMemory(
                "the image and the models need more memory than a prediction may take", hint
            )
            return error.as_dict() | {"retryable": ending.how == "out_of_memory"}
        case _:
            return Internal(f"{ending.message}; nothing is known of the image").as_dict()
