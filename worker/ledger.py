"""Writes of one attempt into the table, under its fence and in order. A table out of reach delays them, no more."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Connection

from base.failpoints import failpoint
from store import attempts, lifecycle
from store.errors import LeaseLost
from store.lifecycle import Claim
from worker.desk import AWAY, Desk

log = logging.getLogger("distillery.ledger")

T = TypeVar("T")
Write = Callable[[Connection], Iterable[Path]]
"""Writes to the table, and returns the files that may go once that is committed."""

BATCH_S = 0.2
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0


class GivenUp(Exception):
    """The worker had to leave before the table could be reached: the next one will do the work again."""


class Ledger:
    """Lines are written in batches from a thread of its own, so that a slow table never holds up the training."""

    def __init__(self, claim: Claim, desk: Desk, lost: threading.Event) -> None:
        self._claim, self._desk, self._lost = claim, desk, lost
        self._waiting: list[Write] = []
        self._progress: dict[str, Any] | None = None
        self._batches = 0
        self._lock = threading.Lock()
        self._more = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"ledger-{claim.job.id}", daemon=True)
        self.told_progress = False
        self.error: BaseException | None = None
        """What made further writing senseless, apart from a lost lease."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, write: Write) -> None:
        with self._lock:
            self._waiting.append(write)
        self._more.set()

    def progress(self, progress: dict[str, Any]) -> None:
        """Only the latest is of interest."""
        with self._lock:
            self._progress = progress
        self.told_progress = True
        self._more.set()

    def close(self) -> None:
        """Wait until all is written, or cannot be any more."""
        self._closing.set()
        self._more.set()
        self._thread.join()

    def insist(self, write: Callable[[Connection], T], committed: str = "lines.committed") -> T:
        """One transaction, tried until it is in, once. Raises LeaseLost, or GivenUp when the worker has to leave.

        One thread at a time: the ledger's own until it is closed, or nothing has been given to it yet.
        `committed`: the failpoint behind its commit.
        """
        job_id, fence, wait_s = self._claim.job.id, self._claim.fence, FIRST_WAIT_S
        self._batches += 1
        while True:
            try:
                with self._desk.database.begin() as connection:
                    # Where it is not begun it is in, and `written` is from the time before.
                    if attempts.begin_batch(connection, job_id, fence, self._batches):
                        written = write(connection)
                failpoint(committed)
                return written
            except AWAY as error:
                log.warning("job %s: the table cannot be written, trying again: %s", job_id, error)
            if self._lost.is_set():
                raise LeaseLost(job_id, fence)
            if self._desk.drain.over:
                raise GivenUp
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _run(self) -> None:
        try:
            while self._more.wait():
                self._more.clear()
                self._write_batch()
                if self._closing.is_set() and not self._waiting:
                    return
                # After a write and not before: the first line of all is not to wait for others.
                self._closing.wait(BATCH_S)
        except (LeaseLost, GivenUp):
            self._lost.set()
        except Exception as error:
            # Whatever it is, the supervisor must hear of it: it ends the job with it.
            log.exception("job %s: its lines cannot be written", self._claim.job.id)
            self.error = error

    def _write_batch(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, []
            progress, self._progress = self._progress, None
        if not batch and progress is None:
            return
        job, fence = self._claim.job, self._claim.fence

        def write_all(connection: Connection) -> list[Path]:
            spared = [path for write in batch for path in write(connection)]
            if progress is not None:
                lifecycle.set_progress(connection, job.id, fence, progress)
            return spared

        for path in self.insist(write_all):
            failpoint("checkpoint.superseded")
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                # No reason to stop a training: no row names it any more, and the collector comes by.
                log.warning("job %s: a checkpoint that nobody needs stays: %s", job.id, error)
