"""Looking at processes from outside, and waiting for what must come true."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")), "run")
PATIENCE_S = 30.0

T = TypeVar("T")


def until(look: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """The first true answer of `look`; fails, saying what was awaited, when none comes."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer := look():
            return answer
        time.sleep(0.01)
    raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")


def refused(module: str, *flags: str) -> str:
    """What a program of ours says that is not to start, on standard error."""
    started = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert started.returncode == 1, started.stderr
    return started.stderr


def in_session(session: int) -> list[int]:
    """Living processes of a session. A zombie has ended: it only waits to be counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, of_session, *_ = rest.split()
        if int(of_session) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def none_left(session: int) -> None:
    until(lambda: not in_session(session), f"the end of session {session}")
