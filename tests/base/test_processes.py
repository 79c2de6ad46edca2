import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.worker.processes import until

CHILD = "import os, sys, time; from base.processes import end_with_parent; end_with_parent(int(sys.argv[1])); "
REPOSITORY = Path(__file__).parents[2]


def test_end_with_parent_when_the_parent_is_killed():
    waits = f"{CHILD}print(os.getpid(), flush=True); time.sleep(60)"
    parent = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {waits!r}, str(os.getpid())], start_new_session=True)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.kill()
    until(lambda: not is_running(child), "the child to end")


def test_end_with_parent_after_the_parent_has_ended():
    no_parent = "1" if os.getpid() != 1 else "2"
    child = [sys.executable, "-c", f"{CHILD}print('goes on')", no_parent]
    ended = subprocess.run(child, cwd=REPOSITORY, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")


def is_running(pid: int) -> bool:
    """Return whether the process runs; a zombie has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
