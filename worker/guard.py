"""Stands between a worker and its engine, so that a training never outlives the right to run.

    python -I worker/guard.py DEADLINE -- COMMAND...

It is started as the leader of a session of its own, with a pipe as standard input. It kills its whole group, data
loaders included, when that pipe ends (the worker died) or when CLOCK_BOOTTIME, which also counts sleep, passes the
last deadline: the first argument, or a later line on the pipe (the worker froze). SIGTERM goes on to the engine alone:
a checkpoint needs its data loaders. The engine's exit code is passed on, and as 128 + n when signal n ended it; dying
of SIGKILL itself thus means that the group was killed. What leaves the session (`setsid`) is out of its reach.
"""

import os
import select
import signal
import subprocess
import sys
import time

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
STDIN = 0
LONGEST_WAIT_S = 0.5  # select's clock stands still while the machine sleeps, ours does not


def main() -> int:
    deadline, command = float(sys.argv[1]), sys.argv[sys.argv.index("--") + 1 :]
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    stop_asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop_asked.append(1))
    engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    while engine.poll() is None:
        if stop_asked:
            stop_asked.clear()
            engine.terminate()
        left_s = max(0.0, deadline - time.clock_gettime(CLOCK))
        readable, _, _ = select.select([STDIN, woken], [], [], min(left_s, LONGEST_WAIT_S))
        # Before the pipe is read: what was written while we were frozen came too late.
        if time.clock_gettime(CLOCK) >= deadline:
            os.killpg(0, signal.SIGKILL)
        if woken in readable:
            os.read(woken, 4096)
        if STDIN in readable:
            lines = os.read(STDIN, 65536)
            if not lines:
                os.killpg(0, signal.SIGKILL)
            deadline = float(lines.split()[-1])
    return engine.returncode if engine.returncode >= 0 else 128 - engine.returncode


if __name__ == "__main__":
    sys.exit(main())
