"""Real processes: what the tether holds must end with whoever holds the tether."""

import subprocess
import sys
import time
from collections.abc import Callable

SLEEPS = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
TETHER = "import sys; from client import tether; tether.GRACE_S = 0.3; sys.exit(tether.main(sys.argv[1:]))"


def tethered(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TETHER, sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen[str], let_go: Callable[[], object]) -> int:
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        let_go()
        assert process.stdout.read() == "", "the command still holds its output"
        return process.wait(10)


def test_the_command_ends_when_the_holder_lets_go():
    process = tethered(SLEEPS)
    assert process.stdin is not None
    assert ends(process, process.stdin.close) == 128 + 15


def test_a_command_that_will_not_stop_is_killed():
    process = tethered(STUBBORN)
    assert process.stdin is not None
    assert ends(process, process.stdin.close) == 128 + 9


def test_what_the_command_started_ends_with_it():
    """The grandchild holds the output open: reading to the end proves that it is gone."""
    grandchild = "import os, time; print('up', flush=True); os.write(2, b'.'); time.sleep(60)"
    start = f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], stderr=subprocess.PIPE)"
    family = f"import subprocess, sys; {start}.stderr.read(1)"
    assert ends(tethered(family), lambda: None) == 0


def test_the_exit_code_is_the_commands_own():
    process = tethered("print('up', flush=True); raise SystemExit(7)")
    assert ends(process, lambda: time.sleep(0)) == 7
