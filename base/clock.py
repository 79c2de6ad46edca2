"""The host's clock, random jitter, and the rule for when an expired lease may be taken over."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from base.errors import DatabaseUnavailable

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
offset_s = 0.0
"""Added to the clock. Only tests set it, to move time forward without waiting (`tests/clock.py`)."""
JITTER = 0.4
"""The random part of a period: after an outage, processes do not all query the database at the same moment."""


def boottime() -> float:
    """Return the seconds of this host's own clock, which is never adjusted and also counts sleep."""
    return time.clock_gettime(CLOCK) + offset_s


def jittered(period_s: float) -> float:
    """Return a random time between (1 - JITTER) * period and the period."""
    return period_s * random.uniform(1 - JITTER, 1)  # noqa: S311


class Contact:
    """The time since which this process has been in contact with the database without a break.

    An owner whose lease has expired may have been unable to reach the database. So its job may be taken over only
    by a process that has been in contact for a whole lease.
    """

    def __init__(self, longest_gap_s: float) -> None:
        self._longest_gap_s = longest_gap_s
        self._since: float | None = None
        self._last = float("-inf")
        self._lock = threading.Lock()

    def made(self) -> None:
        with self._lock:
            now = boottime()
            if self._since is None or now - self._last > self._longest_gap_s:
                self._since = now
            self._last = now

    def lost(self) -> None:
        with self._lock:
            self._since = None

    def unbroken_for(self, duration_s: float) -> bool:
        with self._lock:
            now = boottime()
            fresh = now - self._last <= self._longest_gap_s
            return fresh and self._since is not None and now - self._since >= duration_s

    @contextmanager
    def takeover_gate(self, requested_at: float, *, lease_s: float, heartbeat_s: float) -> Iterator[bool]:
        """Yield whether a transaction may take over jobs whose lease has expired. Enter it inside that transaction.

        `requested_at` (`boottime`): when the transaction was requested. If it had to wait longer than a heartbeat for
        its turn to write, the owners of those jobs may be waiting too, and the answer is False. If this process was
        suspended during its turn, the owners had to wait for it: then DatabaseUnavailable is raised, which rolls the
        transaction back.
        """
        if boottime() - requested_at > heartbeat_s:
            self.lost()
        self.made()
        allowed = self.unbroken_for(lease_s)
        yield allowed
        if allowed and boottime() - requested_at > heartbeat_s:
            raise DatabaseUnavailable("the transaction took longer than a heartbeat; it kept the owners from writing")
