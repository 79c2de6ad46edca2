"""A child ends with its killed parent; a signal to stop is only noted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.worker.processes import until

CHILD = "import os, sys, time; from base.processes import end_with_parent; end_with_parent(int(sys.argv[1])); "
REPOSITORY = Path(__file__).parents[2]


def test_end_with_parent_ends_a_child_whose_parent_is_killed():
    waits = f"{CHILD}print(os.getpid(), flush=True); time.sleep(60)"
    parent = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {waits!r}, str(os.getpid())], start_new_session=True)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.kill()
    until(lambda: not is_there(child), "the child to end")


def test_end_with_parent_ends_a_child_whose_parent_has_ended_already():
    not_its_parent = "1" if os.getpid() != 1 else "2"
    child = [sys.executable, "-c", f"{CHILD}print('goes on')", not_its_parent]
    ended = subprocess.run(child, cwd=REPOSITORY, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")


def test_stop_signals_notes_a_signal_and_nothing_else_happens():
    program = (
        "import os, signal, select; from base.processes import stop_signals; pipe = stop_signals()\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"
        "    assert not select.select([pipe], [], [], 0)[0]\n"
        "    os.kill(os.getpid(), number)\n"
        "    assert os.read(pipe, 1) == bytes([number])"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


def is_there(pid: int) -> bool:
    """A zombie has ended: it only waits to be counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
