"""Real processes: a child ends with the process that started it, even if that one is killed."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from base.processes import importing
from tests.worker.processes import until

CHILD = "import os, sys, time; from base.processes import end_with_parent; end_with_parent(int(sys.argv[1])); "
REPOSITORY = Path(__file__).parents[2]


def test_importing_collects_no_garbage_and_keeps_what_was_made_out_of_later_collections():
    kept = gc.get_freeze_count()
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        made = [[] for _ in range(1_000)]
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() >= kept + len(made)


@pytest.mark.parametrize("module", ["serve", "api.__main__", "worker.__main__"])
def test_after_imports_is_called_by_each_program_that_disables_garbage_collection(module: str):
    """It is disabled in a program, not in a process that only imports the module."""
    source = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()
    assert 'if __name__ == "__main__":\n    gc.disable()' in source
    main = source[source.index("\ndef main(") :].splitlines()[2]
    assert main == "    after_imports()"


def test_end_with_parent_ends_the_child_of_a_killed_parent():
    waits = f"{CHILD}print(os.getpid(), flush=True); time.sleep(60)"
    parent = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {waits!r}, str(os.getpid())], start_new_session=True)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        process.kill()
    until(lambda: not is_there(child), "the child to end")


def test_end_with_parent_after_the_end_of_the_parent():
    other = "1" if os.getpid() != 1 else "2"
    child = [sys.executable, "-c", f"{CHILD}print('goes on')", other]
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


SLEEPS = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPS}"
RUN = (
    "import sys; from base import processes; processes.STOP_GRACE_S = 0.3; "
    "sys.exit(processes.run_until_stdin_closes(sys.argv[1:]))"
)


def start(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen[str], act: Callable[[], object]) -> int:
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        act()
        assert process.stdout.read() == "", "the command still holds its output"
        return process.wait(10)


def test_run_until_stdin_closes_stops_the_command():
    process = start(SLEEPS)
    assert process.stdin is not None
    assert ends(process, process.stdin.close) == 128 + 15


def test_run_until_stdin_closes_kills_a_command_that_ignores_sigterm():
    process = start(STUBBORN)
    assert process.stdin is not None
    assert ends(process, process.stdin.close) == 128 + 9


def test_run_until_stdin_closes_ends_the_whole_process_group():
    """The grandchild holds the output open: reading to its end proves that the grandchild has ended."""
    grandchild = "import os, time; print('up', flush=True); os.write(2, b'.'); time.sleep(60)"
    begin = f"subprocess.Popen([sys.executable, '-c', {grandchild!r}], stderr=subprocess.PIPE)"
    family = f"import subprocess, sys; {begin}.stderr.read(1)"
    assert ends(start(family), lambda: None) == 0


def test_run_until_stdin_closes_returns_the_exit_code():
    process = start("print('up', flush=True); raise SystemExit(7)")
    assert ends(process, lambda: time.sleep(0)) == 7


def test_raise_descriptor_limit_is_inherited_and_free_descriptors_counts():
    script = (
        "import resource, subprocess, sys; from base.processes import free_descriptors, raise_descriptor_limit; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200)); few = free_descriptors(); raise_descriptor_limit(); "
        "print(few, free_descriptors() - few, subprocess.check_output(['sh', '-c', 'ulimit -n'], text=True))"
    )
    few, more, inherited = subprocess.check_output([sys.executable, "-c", script], text=True, cwd=REPOSITORY).split()
    assert 50 < int(few) < 64 and (int(more), int(inherited)) == (136, 200)
