"""A child process that ends with its parent, even if the parent was killed.

On Linux only. On other systems the children of a killed process continue, and must be ended by hand.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
# Not looked up in `end_with_parent`: between fork and exec a process should do as little as possible.
_prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when the process `parent` ends. Call it in the child; it survives exec.

    The kernel watches the thread that started the child: it must live as long as its process.
    """
    if _prctl is None:
        return
    if _prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not watch the parent process")
    if os.getppid() != parent:
        # The parent ended before the call.
        os.kill(os.getpid(), signal.SIGKILL)
