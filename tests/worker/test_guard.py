"""The guard by itself: the exit codes and signals that it passes on, and when it kills."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from base import clock
from tests.worker.processes import in_session, none_left, until
from worker import guard

SLEEP = "import time; time.sleep(600)"
LOADERS = f"import subprocess, sys; [subprocess.Popen([sys.executable, '-c', {SLEEP!r}]) for _ in '12']; {SLEEP}"


@contextmanager
def guarded(program: str, left_s: float = 600) -> Iterator[subprocess.Popen[bytes]]:
    deadline = time.clock_gettime(guard.CLOCK) + left_s
    command = [sys.executable, "-I", guard.__file__, repr(deadline), "--", sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(75)", 75),
        ("import os; os._exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os.abort()", 134),
    ],
)
def test_guard_passes_on_the_exit_code(program: str, code: int):
    with guarded(program) as process:
        assert process.wait(20) == code


def test_guard_kills_the_whole_session_when_its_pipe_is_closed():
    with guarded(LOADERS) as process:
        until(lambda: len(in_session(process.pid)) == 4, "guard, engine and two loaders")
        process.stdin.close()
        assert process.wait(20) == -signal.SIGKILL
        none_left(process.pid)


def test_guard_kills_the_whole_session_at_its_deadline():
    with guarded(LOADERS, left_s=0.5) as process:
        assert process.wait(20) == -signal.SIGKILL
        none_left(process.pid)


def test_guard_accepts_a_later_deadline():
    with guarded("import time; time.sleep(1)", left_s=0.6) as process:
        now = time.clock_gettime(guard.CLOCK)
        process.stdin.write(f"{now + 5}\n{now + 600}\n".encode())
        assert process.wait(20) == 0


def test_guard_that_was_frozen_kills_before_it_reads_a_deadline_that_came_too_late():
    with guarded(SLEEP, left_s=0.5) as process:
        until(lambda: len(in_session(process.pid)) == 2, "guard and engine")
        os.kill(process.pid, signal.SIGSTOP)
        late = time.clock_gettime(guard.CLOCK) + 0.6
        until(lambda: time.clock_gettime(guard.CLOCK) > late, "the deadline to pass")
        process.stdin.write(f"{late + 600}\n".encode())
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(20) == -signal.SIGKILL
        none_left(process.pid)


def test_guard_passes_sigterm_on_to_the_engine_only():
    """Data loaders must not get it: the engine may need them for its last step."""
    program = (
        "import signal, subprocess, sys, time\n"
        f"loader = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "def stop(*_):\n"
        "    time.sleep(0.1)\n"
        "    code = 75 if loader.poll() is None else 1\n"
        "    loader.kill(); loader.wait(); sys.exit(code)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', file=sys.stderr, flush=True)\n"
        "time.sleep(600)"
    )
    deadline = time.clock_gettime(guard.CLOCK) + 600
    command = [sys.executable, "-I", guard.__file__, repr(deadline), "--", sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0
    ) as process:
        assert process.stderr.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 75


def test_guard_reads_the_same_clock_as_the_worker():
    assert clock.CLOCK == guard.CLOCK
