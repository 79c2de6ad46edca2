"""The heartbeat of one attempt: proof to the table that its worker lives, and to the guard that it may go on."""

import logging
import threading
from collections.abc import Callable
from typing import Self

from base.clock import boottime
from base.failpoints import failpoint
from store import lifecycle
from store.errors import LeaseLost
from store.lifecycle import Claim
from worker.desk import AWAY, Desk
from worker.session import Session

log = logging.getLogger("distillery.heart")

SAFE_PART = 0.8
"""The guard's deadline as part of a lease: the old training is dead before anybody else may claim."""


class Heart:
    """Beats from claim to finish, on a thread and a connection with nothing else on them.

    A refused beat kills the training at once. A table out of reach does not: nobody else can claim either, and what
    is written later is fenced. `max_unproven_s` bounds how long that is believed.
    """

    def __init__(self, claim: Claim, desk: Desk, claimed_at: float, proven: Callable[[], None]) -> None:
        """`claimed_at`: the time (`boottime`) just before the claim, when the lease cannot have begun yet.

        `proven` is called for each beat that the table has taken.
        """
        self._claim, self._desk, self._proven = claim, desk, proven
        self._lease_s = desk.settings.lease_s
        self._deadline = claimed_at + SAFE_PART * self._lease_s
        self._proven_at = claimed_at
        self._session: Session | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"heart-{claim.job.id}", daemon=True)
        self.requested = claim.job.requested
        self.lost = threading.Event()
        """Another attempt owns the job, or nobody knows any more whether we do."""
        self.unproven = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def deadline(self) -> float:
        return self._deadline

    def keep(self, session: Session | None) -> None:
        """Tick for its guard from now on; None before it is left behind."""
        with self._lock:
            self._session = session
        self._tell_guard()

    def _run(self) -> None:
        beat: _Beat | None = None
        while not self._stop.wait(self._desk.settings.heartbeat_s) and not self.lost.is_set():
            beat = beat or self._begin_beat()
            if beat is None:
                self._go_on_unproven()
                continue
            # One that hangs counts as a table out of reach, and is waited for again next time.
            beat.join(self._lease_s / 4)
            if not beat.is_alive():
                self._take(beat)
                beat = None
            elif self._stop.is_set():
                return
            else:
                self._go_on_unproven()

    def _begin_beat(self) -> "_Beat | None":
        """None: this process may have no further thread for the moment, which is no proof of life."""
        try:
            return _Beat(self._claim, self._desk)
        except RuntimeError as error:
            log.warning("job %s: no heartbeat can be sent: %s", self._claim.job.id, error)
            return None

    def _take(self, beat: "_Beat") -> None:
        if beat.refused:
            self.lost.set()
        elif beat.reached:
            self._proven_at, self.requested = beat.began_at, beat.requested
            # One that hung until the table came back is older than what was granted without it.
            self._deadline = max(self._deadline, beat.deadline)
            self._desk.contact.made()
            self._proven()
        else:
            self._go_on_unproven()
        self._tell_guard()

    def _go_on_unproven(self) -> None:
        now = boottime()
        self._desk.contact.lost()
        if now - self._proven_at > self._desk.settings.max_unproven_s:
            self.unproven = True
        else:
            self._deadline = now + SAFE_PART * self._lease_s
        self._tell_guard()

    def _tell_guard(self) -> None:
        with self._lock:
            if self._session is None:
                return
            if self.lost.is_set() or self.unproven:
                self._session.kill()
            else:
                self._session.tick(self._deadline)


class _Beat(threading.Thread):
    """One heartbeat under way. The deadline counts from before it is sent, so a late answer cannot stretch it."""

    def __init__(self, claim: Claim, desk: Desk) -> None:
        super().__init__(name=f"beat-{claim.job.id}", daemon=True)
        self._claim, self._desk = claim, desk
        self.began_at = boottime()
        self.deadline = self.began_at + SAFE_PART * desk.settings.lease_s
        self.reached = self.refused = False
        self.requested: str | None = None
        self.start()

    def run(self) -> None:
        job, fence, lease_s = self._claim.job, self._claim.fence, self._desk.settings.lease_s
        try:
            with self._desk.heart_database.begin() as connection:
                self.requested = lifecycle.heartbeat(connection, job.id, fence, lease_s)
                failpoint("heartbeat.before_commit")
        except LeaseLost:
            self.refused = True
        except AWAY:
            return
        else:
            self.reached = True
