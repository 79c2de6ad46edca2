"""Moments that a test can force: a process dies, freezes or stumbles at a named line, and not somewhere near it.

    DISTILLERY_FAILPOINTS="checkpoint.stored=kill:2,finish.committed=away"

A name, what happens there, and at which passing (the first, where none is said). Left unset, a failpoint is one lookup
in an empty dictionary. Names are written where they stand: `git grep 'failpoint('` lists them.
"""

import errno
import os
import signal
from collections.abc import Callable

from base.errors import DatabaseUnavailable

VARIABLE = "DISTILLERY_FAILPOINTS"


def _send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _hang() -> None:
    """This thread alone, until somebody sends SIGCONT, as one does to a frozen process."""
    signal.sigwait({signal.SIGCONT})


def _away() -> None:
    raise DatabaseUnavailable("a failpoint cut the connection")


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _send(signal.SIGKILL),
    "freeze": _send(signal.SIGSTOP),
    "hang": _hang,
    "away": _away,
    "full": _full,
}


def failpoint(name: str) -> None:
    """To be called at a moment worth failing at. Threads count together."""
    armed = _armed.get(name)
    if armed is not None:
        armed()


def arm(text: str) -> None:
    """Set what `VARIABLE` would; ValueError for what cannot be meant."""
    _armed.clear()
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, _, rest = part.partition("=")
        action, _, passing = rest.partition(":")
        if action not in ACTIONS or not (passing or "1").isdecimal():
            raise ValueError(f"{VARIABLE}: {part!r} is not NAME=ACTION[:PASSING]; actions: {', '.join(ACTIONS)}")
        _armed[name] = _at(int(passing or "1"), ACTIONS[action])
        if action == "hang":
            # Threads inherit it: unblocked in any, the signal would be gone before it is waited for.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})


def _at(passing: int, act: Callable[[], None]) -> Callable[[], None]:
    passed = 0

    def pass_by() -> None:
        nonlocal passed
        passed += 1
        if passed == passing:
            act()

    return pass_by


_armed: dict[str, Callable[[], None]] = {}
arm(os.environ.get(VARIABLE, ""))
