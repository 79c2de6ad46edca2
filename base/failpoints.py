"""Failpoints: a test makes a process die, freeze or fail at exactly one named line.

    DISTILLERY_FAILPOINTS="checkpoint.stored=kill:2,finish.committed=away"

An entry has a name, an action, and the pass through the line that triggers it (default: the first). Without the
variable, a failpoint is one lookup in an empty dictionary. `git grep 'failpoint('` lists the names.
"""

import errno
import os
import signal
import threading
from collections.abc import Callable

from base.errors import DatabaseUnavailable

VARIABLE = "DISTILLERY_FAILPOINTS"


def _send(number: signal.Signals) -> Callable[[], None]:
    # To this thread: a signal to the process may let it go on for a moment.
    return lambda: signal.pthread_kill(threading.get_ident(), number)


def _hang() -> None:
    """Freeze this thread only, until SIGCONT arrives, which also wakes a frozen process."""
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
    """Run the action of this name, if it is armed. The passes of all threads are counted together."""
    armed = _armed.get(name)
    if armed is not None:
        armed()


def arm(text: str) -> None:
    """Arm failpoints as `VARIABLE` does. Raises ValueError if the text is not valid."""
    _armed.clear()
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, _, rest = part.partition("=")
        action, _, number = rest.partition(":")
        if action not in ACTIONS or not (number or "1").isdecimal():
            raise ValueError(f"{VARIABLE}: {part!r} is not NAME=ACTION[:PASS]; actions: {', '.join(ACTIONS)}")
        _armed[name] = _at(int(number or "1"), ACTIONS[action])
        if action == "hang":
            # New threads inherit the mask. A thread without it would take the signal before `sigwait` does.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCONT})


def _at(number: int, act: Callable[[], None]) -> Callable[[], None]:
    passes = 0

    def count() -> None:
        nonlocal passes
        passes += 1
        if passes == number:
            act()

    return count


_armed: dict[str, Callable[[], None]] = {}
arm(os.environ.get(VARIABLE, ""))
