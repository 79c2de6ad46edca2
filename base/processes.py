"""A process that ends with the one that started it, even where that one was killed.

Linux only: elsewhere what a killed process started stays, and is to be ended by hand.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
# Looked up here, not in `end_with_parent`: between fork and exec as little as possible may happen.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Asked in the child: the kernel kills it when `parent`, a process id, ends. What it then executes inherits this.

    The kernel watches the thread that started the child: that must be one that lives as long as its process.
    """
    if _prctl is None:
        return
    if _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not watch the parent process")
    if os.getppid() != parent:
        # It ended before the kernel was asked to watch.
        os.kill(os.getpid(), signal.SIGKILL)
