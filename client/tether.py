"""Run a command that ends when we do: `python -m client.tether COMMAND...`. Standard library only.

Whoever starts the tether holds the other end of its standard input. However that process ends, even by `kill -9`, the
pipe closes; the command then gets SIGTERM, time to stop in order, and in the end SIGKILL with all of its group.
"""

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 15


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_stop_at_the_end_of_input, args=(child,), daemon=True).start()
    code = child.wait()
    _kill_group(child)
    return code if code >= 0 else 128 - code


def _stop_at_the_end_of_input(child: subprocess.Popen[bytes]) -> None:
    # A read of the descriptor, not of sys.stdin: a buffered reader's lock would make the interpreter's end wait.
    while os.read(0, 4096):
        pass
    child.terminate()
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _kill_group(child)


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
