"""The process between a worker and its engine: it ends the training when the worker has lost the right to run it.

    python -I worker/guard.py DEADLINE -- COMMAND...

The guard leads a session of its own and has a pipe as standard input. It kills its whole process group, data loaders
included, when the pipe is closed (the worker died), or when CLOCK_BOOTTIME, which also counts sleep, passes the last
deadline (the worker froze). The first deadline is an argument; later ones are lines on the pipe. SIGTERM is passed on
to the engine only, because it needs its data loaders for a checkpoint. The guard exits with the engine's code, or with
128 + n if signal n ended the engine. If the guard itself ends by SIGKILL, the group was killed. A process that leaves
the session (`setsid`) is not killed.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
STDIN = 0
LONGEST_WAIT_S = 0.5  # the clock of `select` does not count sleep


def main() -> int:
    deadline, command = float(sys.argv[1]), sys.argv[sys.argv.index("--") + 1 :]
    signals, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    stop_requested: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop_requested.append(1))
    # If the host runs out of memory, the kernel ends the engine before the worker, the server or the database.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 - few imports
        file.write("500")
    engine = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    while engine.poll() is None:
        if stop_requested:
            stop_requested.clear()
            engine.terminate()
        left_s = max(0.0, deadline - time.clock_gettime(CLOCK))
        readable, _, _ = select.select([STDIN, signals], [], [], min(left_s, LONGEST_WAIT_S))
        # Before the pipe is read: a deadline that arrived while the guard was frozen came too late.
        if time.clock_gettime(CLOCK) >= deadline:
            os.killpg(0, signal.SIGKILL)
        if signals in readable:
            os.read(signals, 4096)
        if STDIN in readable:
            lines = os.read(STDIN, 65536)
            if not lines:
                os.killpg(0, signal.SIGKILL)
            deadline = float(lines.split()[-1])
    return engine.returncode if engine.returncode >= 0 else 128 - engine.returncode


if __name__ == "__main__":
    sys.exit(main())
