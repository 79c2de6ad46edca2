"""How long the database has been within reach: who could not hear it may not say that another was silent."""

import random
import threading
import time

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boottime() -> float:
    """Seconds of this host's own clock, which no one sets and which counts sleep as well."""
    return time.clock_gettime(CLOCK)


JITTER = 0.4
"""Part of a period that is drawn by chance: after an outage not all processes look at the database at once."""


def jittered(period_s: float) -> float:
    """A random time between (1 - JITTER) of the period and the period."""
    return period_s * random.uniform(1 - JITTER, 1)  # noqa: S311


class Contact:
    """For how long the database has been within reach without a break.

    An owner that fell silent may only have been unable to speak. So its job is taken over only by somebody who could
    hear the table for a whole lease, and heard nothing.
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
