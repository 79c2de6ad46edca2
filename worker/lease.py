"""The lease of one attempt: extended in the database by heartbeats, and in the guard by later deadlines."""

import logging
import threading
from collections.abc import Callable
from typing import Self

from base.clock import boottime
from base.failpoints import failpoint
from store import lifecycle
from store.errors import LeaseLost
from store.lifecycle import Claim
from worker.context import UNAVAILABLE, WorkerContext
from worker.engine import SAFE_PART, EngineProcess

log = logging.getLogger("distillery.lease")


class LeaseKeeper:
    """Sends heartbeats from claim to finish, on a thread and a database connection of its own.

    A refused heartbeat kills the training at once. A database that cannot be reached does not: then no other worker
    can claim the job either, and every later write checks the fence. `max_unproven_s` limits how long this is assumed.
    """

    def __init__(self, claim: Claim, context: WorkerContext, claimed_at: float, on_renewed: Callable[[], None]) -> None:
        """`claimed_at` (`boottime`): just before the claim; the lease did not begin earlier.

        `on_renewed` is called after each heartbeat that the database has accepted.
        """
        self._claim, self._context, self._on_renewed = claim, context, on_renewed
        self._lease_s = context.settings.lease_s
        self._deadline = claimed_at + SAFE_PART * self._lease_s
        self._renewed_at = claimed_at
        self._process: EngineProcess | None = None
        self._pending: _Heartbeat | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease-{claim.job.id}", daemon=True)
        self.requested = claim.job.requested
        self.lost = threading.Event()
        """Set when another attempt owns the job, or when the attempt's writes have ended before it did."""
        self.unproven = False
        """True if the database has been out of reach for longer than `max_unproven_s`."""

    def __enter__(self) -> Self:
        if boottime() - self._renewed_at > self._context.settings.heartbeat_s:
            # After a slow claim, the deadline may be over although the lease has just begun.
            self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def deadline(self) -> float:
        return self._deadline

    def attach(self, process: EngineProcess | None) -> None:
        """Extend the deadline of this process from now on; None before the process is closed."""
        with self._lock:
            self._process = process
        self._update_guard()

    def _run(self) -> None:
        while not self._stop.wait(self._context.settings.heartbeat_s) and not self.lost.is_set():
            self._beat()

    def _beat(self) -> None:
        """Send a heartbeat, or wait again for one that hangs. While it hangs, the database counts as out of reach."""
        try:
            self._pending = self._pending or _Heartbeat(self._claim, self._context)
        except RuntimeError as error:
            # The system may have no free thread at the moment.
            log.warning("job %s: no heartbeat can be sent: %s", self._claim.job.id, error)
            self._continue_unproven()
            return
        self._pending.join(self._lease_s / 4)
        if not self._pending.is_alive():
            self._take_answer(self._pending)
            self._pending = None
        elif not self._stop.is_set():
            self._continue_unproven()

    def _take_answer(self, heartbeat: "_Heartbeat") -> None:
        if heartbeat.refused:
            self.lost.set()
        elif heartbeat.accepted:
            self._renewed_at, self.requested = heartbeat.sent_at, heartbeat.requested
            # While the heartbeat hung, later deadlines may have been set.
            self._deadline = max(self._deadline, heartbeat.deadline)
            self._context.contact.made()
            self._on_renewed()
        else:
            self._continue_unproven()
        self._update_guard()

    def _continue_unproven(self) -> None:
        now = boottime()
        self._context.contact.lost()
        if now - self._renewed_at > self._context.settings.max_unproven_s:
            self.unproven = True
        else:
            self._deadline = now + SAFE_PART * self._lease_s
        self._update_guard()

    def _update_guard(self) -> None:
        with self._lock:
            if self._process is None:
                return
            if self.lost.is_set() or self.unproven:
                self._process.kill()
            else:
                self._process.extend(self._deadline)


class _Heartbeat(threading.Thread):
    """One heartbeat in progress. Its deadline counts from before it is sent, so a late answer cannot extend it."""

    def __init__(self, claim: Claim, context: WorkerContext) -> None:
        super().__init__(name=f"heartbeat-{claim.job.id}", daemon=True)
        self._claim, self._context = claim, context
        self.sent_at = boottime()
        self.deadline = self.sent_at + SAFE_PART * context.settings.lease_s
        self.accepted = self.refused = False
        self.requested: str | None = None
        self.start()

    def run(self) -> None:
        job, fence, lease_s = self._claim.job, self._claim.fence, self._context.settings.lease_s
        try:
            with self._context.heartbeat_database.begin() as connection:
                self.requested = lifecycle.heartbeat(connection, job.id, fence, lease_s)
                failpoint("heartbeat.before_commit")
        except LeaseLost:
            self.refused = True
        except UNAVAILABLE:
            return
        else:
            self.accepted = True
