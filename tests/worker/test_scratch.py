"""Scratch folders: gone after use, after an exception, and after a kill, which is then known."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worker.processes import in_session, none_left, until
from tests.worker.table import REPOSITORY
from worker import scratch
from worker.scratch import FOREIGN_AFTER_S, Lock, end, held, scratch_folder, sweep


def test_a_folder_is_there_for_as_long_as_it_is_used(tmp_path: Path):
    with scratch_folder(tmp_path / "scratch", "job_1", 1) as own:
        (own.folder / "file").write_text("x")
        assert sweep(tmp_path / "scratch") == []
        assert (own.folder / "file").exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_an_exception_removes_it_too(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path, "job_1", 1):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_and_told(tmp_path: Path):
    program = (
        "import os, pathlib, sys\n"
        "from worker.scratch import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1]), 'job_dead', 7) as own:\n"
        "    (own.folder / 'file').write_text('x')\n"
        "    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    with scratch_folder(tmp_path, "job_alive", 1) as alive:
        assert [(lock.job_id, lock.fence) for lock in sweep(tmp_path)] == [("job_dead", 7)]
        assert sorted(tmp_path.iterdir()) == [alive.folder, tmp_path / f"{alive.folder.name}.lock"]


def test_another_hosts_lock_proves_nothing(tmp_path: Path):
    lock, folder = tmp_path / "job_1.1.elsewhere.example.lock", tmp_path / "job_1.1.elsewhere.example"
    lock.touch()
    folder.mkdir()
    assert sweep(tmp_path) == []
    assert folder.exists()
    long_ago = time.time() - FOREIGN_AFTER_S - 60
    os.utime(lock, (long_ago, long_ago))
    assert sweep(tmp_path) == [], "nobody is declared dead by its age"
    assert not list(tmp_path.iterdir())


def test_the_same_name_can_be_used_again(tmp_path: Path):
    for _ in range(2):
        with scratch_folder(tmp_path, "job_1", 1) as own:
            assert not list(own.folder.iterdir())


def test_no_sweep_finds_a_lock_free_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It comes just before the new file is locked, takes it for a leftover, and declares nobody dead."""
    swept: list[list[Lock]] = []

    def sweep_first(descriptor: int, operation: int) -> None:
        if not swept:
            swept.append([])
            swept[0] = sweep(tmp_path)
        fcntl.flock(descriptor, operation)

    with_flock(monkeypatch, sweep_first)
    with scratch_folder(tmp_path, "job_1", 1):
        assert swept == [[]]
        assert [lock.job_id for lock in held(tmp_path)] == ["job_1"]


def with_flock(monkeypatch: pytest.MonkeyPatch, flock: Callable[[Any, int], None]) -> None:
    monkeypatch.setattr(scratch, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": flock}))


def test_no_file_is_locked_that_is_open_for_reading_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS turns that away."""

    def as_on_nfs(file: Any, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fcntl.flock(file, operation)

    with_flock(monkeypatch, as_on_nfs)
    (tmp_path / f"job_dead.7.{scratch.HOST}.lock").touch()
    with scratch_folder(tmp_path, "job_1", 1):
        assert [lock.job_id for lock in held(tmp_path)] == ["job_1"]
        assert [lock.job_id for lock in sweep(tmp_path)] == ["job_dead"]


def test_a_folder_that_cannot_be_removed_keeps_its_lock_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as refused:
        refused.setattr(shutil, "rmtree", lambda *_, **__: None)
        with scratch_folder(tmp_path, "job_1", 1) as own:
            pass
        assert sweep(tmp_path) == []
        assert own.folder.exists()
    assert [lock.job_id for lock in sweep(tmp_path)] == ["job_1"]
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_had_is_told_and_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patched:
        with_flock(patched, refuse)
        with pytest.raises(OSError, match="No locks available"), scratch_folder(tmp_path, "job_1", 1):
            pass
    open_here = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in open_here if path.startswith(str(tmp_path))]
    assert sweep(tmp_path) == []
    assert not list(tmp_path.iterdir())


@contextmanager
def in_a_session(program: str, *holding: int) -> Iterator[subprocess.Popen[str]]:
    """A process that leads a session, and says a word once it runs."""
    words = [sys.executable, "-c", f"print('here', flush=True)\n{program}"]
    with subprocess.Popen(
        words, start_new_session=True, pass_fds=holding, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        try:
            yield process
        finally:
            process.kill()


SLEEP = "import time; time.sleep(600)"
FORK = f"import os; os.fork(); {SLEEP}"


def test_whoever_holds_the_lock_is_ended_with_all_that_it_forked(tmp_path: Path):
    with scratch_folder(tmp_path, "job_1", 1) as own, in_a_session(FORK, own.lock) as engine:
        until(lambda: len(in_session(engine.pid)) == 2, "the engine and its fork")
        own.note(engine.pid)
        (lock,) = held(tmp_path)
        assert end(lock)
        none_left(engine.pid)
        assert not end(lock), "this process holds it still, and is no engine"


def test_a_lock_is_held_until_the_last_fork_has_ended(tmp_path: Path):
    """The worker is gone, its engine too, and a loader lives: nobody may take the job for abandoned yet."""
    with in_a_session(
        "import os, sys; sys.path.insert(0, os.getcwd()); from pathlib import Path\n"
        "from worker.scratch import scratch_folder\n"
        f"with scratch_folder(Path({str(tmp_path)!r}), 'job_1', 1):\n"
        "    if os.fork():\n"
        "        os._exit(9)\n"
        f"    {SLEEP}"
    ) as worker:
        worker.wait(60)
        assert len(in_session(worker.pid)) == 1
        assert sweep(tmp_path) == []
        assert len(held(tmp_path)) == 1
        os.killpg(worker.pid, signal.SIGKILL)
        until(lambda: [lock.fence for lock in sweep(tmp_path)] == [1], "the lock to be free")


@pytest.mark.parametrize("noted", ["", "  \n", "not a number", "1", "999999999"])
def test_nobody_is_ended_who_does_not_hold_the_lock(tmp_path: Path, noted: str):
    with scratch_folder(tmp_path, "job_1", 1), in_a_session(SLEEP) as innocent:
        (lock,) = held(tmp_path)
        lock.path.write_text(noted or str(innocent.pid))
        assert not end(lock)
        assert innocent.poll() is None
