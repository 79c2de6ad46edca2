"""What all processes of the service do alike: log, take signals, and end with the process that started them."""

import ctypes
import logging
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
# Looked up here, not in `end_with_parent`: between fork and exec as little as possible may happen.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def log_to_stderr(*quiet: str) -> None:
    """Set up logging of a process. `quiet`: loggers that write warnings and errors only."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in quiet:
        logging.getLogger(name).setLevel(logging.WARNING)


def stop_signals() -> int:
    """A pipe that becomes readable when SIGINT or SIGTERM comes; nothing else happens then.

    A handler could not do more: it must not take locks that the interrupted code may hold.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return readable


def end_with_parent(parent: int) -> None:
    """Make the kernel kill this process when `parent`, a process id, ends. To be called in the child; exec keeps it.

    The kernel watches the thread that started the child: it must live as long as its process. Linux only: elsewhere
    the children of a killed process stay.
    """
    if _prctl is None:
        return
    if _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not watch the parent process")
    if os.getppid() != parent:
        # The parent ended before the kernel watched it.
        os.kill(os.getpid(), signal.SIGKILL)
