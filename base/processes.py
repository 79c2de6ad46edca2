"""Helpers of all processes: imports, signals, and two ways to end a process together with its parent.

`end_with_parent` is called in the child; the kernel then kills it at once. Linux only: on other systems the child of a
killed process keeps running.

`python -m base.processes COMMAND...` runs a command until its standard input closes. The starter holds the other end of
that pipe, which closes when the starter ends in any way. The command gets SIGTERM, time to stop, and then SIGKILL
with its whole process group. This works on every system. It uses the standard library only, so it starts quickly.
"""

import ctypes
import errno
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
# Loaded here, not in `end_with_parent`: as little code as possible may run between fork and exec.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

MOST_DESCRIPTORS = 1 << 20
STOP_GRACE_S = 15
"""Time between SIGTERM and SIGKILL."""


@contextmanager
def importing() -> Iterator[None]:
    """Imports inside of it take no garbage collections: those find nothing, and are a fifth of the time of torch's."""
    gc.disable()
    try:
        yield
    finally:
        after_imports()


def after_imports() -> None:
    """Enable garbage collection, which from now on, and at the exit, leaves out the objects that exist already."""
    gc.freeze()
    gc.enable()


def raise_descriptor_limit() -> None:
    """Let this process, and those that it starts, open as many files as its host allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Some systems have a limit below the one that they name.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def free_descriptors() -> int | None:
    """Return how many more files this process may open; None where the system does not say."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(list(Path("/proc/self/fd").iterdir()))
    except OSError as error:
        return 0 if error.errno in (errno.EMFILE, errno.ENFILE) else None
    return None if soft == resource.RLIM_INFINITY else soft - used


def stop_signals() -> int:
    """Return a descriptor that becomes readable when SIGINT or SIGTERM arrives. The signals have no other effect.

    A signal handler cannot do more, because it must not take locks that the interrupted code may hold.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return readable


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when `parent`, a process id, ends. Programs executed later inherit this.

    The kernel watches the thread that started the child: that thread must live as long as its process.
    """
    if _prctl is None:
        return
    if _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not watch the parent process")
    if os.getppid() != parent:
        # The parent ended before the call.
        os.kill(os.getpid(), signal.SIGKILL)


def run_until_stdin_closes(command: list[str]) -> int:
    """Run a command and return its exit code, 128 + signal if a signal ended it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_at_end_of_input, args=(child,), daemon=True).start()
    code = child.wait()
    kill_group(child.pid)
    return code if code >= 0 else 128 - code


def _stop_at_end_of_input(child: subprocess.Popen[bytes]) -> None:
    # Reads the descriptor, not sys.stdin: the lock of a buffered reader would block the interpreter's exit.
    while os.read(0, 4096):
        pass
    child.terminate()
    try:
        child.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        kill_group(child.pid)


def kill_group(leader: int) -> None:
    """Kill all processes of a group, by the id of its leader. There may be none left."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run_until_stdin_closes(sys.argv[1:]))
