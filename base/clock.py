"""This host's clock, and the time for which the database has been within reach."""

import random
import threading
import time

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

offset_s = 0.0
"""Only tests set it (`tests/clock.py`): time moves forward without waiting."""


def boottime() -> float:
    """Return the seconds since this host started. The clock is never set, and counts the time in suspend as well."""
    return time.clock_gettime(CLOCK) + offset_s


JITTER = 0.4
"""The random part of a period: after an outage, not all processes poll the database at the same time."""


def jittered(period_s: float) -> float:
    """Return a random time between (1 - JITTER) of the period and the period."""
    return period_s * random.uniform(1 - JITTER, 1)  # noqa: S311


class Contact:
    """The time for which the database has been within reach without a break.

    If an owner's lease has expired, the database may have been out of reach for all. So a process takes over jobs only
    after it has been in contact with the database for a whole lease.
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
            is_recent = now - self._last <= self._longest_gap_s
            return is_recent and self._since is not None and now - self._since >= duration_s
