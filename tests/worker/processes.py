"""Processes observed from outside, and waiting for a condition."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")), "run")
PATIENCE_S = 60.0

T = TypeVar("T")


def pause_s(waited_s: float) -> float:
    """The time between two looks at a condition: longer after long waiting, because each look costs processor time."""
    return min(0.2, 0.01 + waited_s / 25)


def until(condition: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """The first true result of `condition`; fails with `what` if there is none in time."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < timeout_s:
        if result := condition():
            return result
        time.sleep(pause_s(waited))
    raise AssertionError(f"after {timeout_s:g} s still waiting for {what}")


def refused(module: str, *flags: str) -> str:
    """Start one of our programs, which must refuse to run; returns its standard error."""
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
    """Living processes of a session. A zombie has ended and is not reaped yet."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            _, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, of_session, *_ = rest.split()
        if int(of_session) == session and state not in "ZX":
            processes.append(int(path.parent.name))
    return processes


def none_left(session: int) -> None:
    until(lambda: not in_session(session), f"the end of session {session}")
