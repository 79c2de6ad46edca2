"""Locked folders are removed after use, after an exception, and by another process after a kill."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from base import folders
from base.folders import HOST, locked_folder, remove_abandoned, used_folders

DAY_S = 86_400
REPOSITORY = Path(__file__).parents[2]


def test_locked_folder_is_there_for_as_long_as_it_is_used(tmp_path: Path):
    with locked_folder(tmp_path / "scratch", "job_1.1") as own:
        assert own.path == tmp_path / "scratch" / f"job_1.1.{HOST}"
        (own.path / "file").write_text("x")
        assert remove_abandoned(tmp_path / "scratch", DAY_S) == []
        assert (own.path / "file").exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_locked_folder_is_removed_after_an_exception(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path, "job_1.1"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_locked_folder_may_have_a_name_that_was_used_before(tmp_path: Path):
    for _ in range(2):
        with locked_folder(tmp_path, "job_1.1") as own:
            assert not list(own.path.iterdir())


def test_remove_abandoned_removes_what_a_killed_process_left(tmp_path: Path):
    program = (
        "import os, pathlib, sys\n"
        "from base.folders import locked_folder\n"
        "with locked_folder(pathlib.Path(sys.argv[1]), 'job_dead.7') as own:\n"
        "    (own.path / 'file').write_text('x')\n"
        "    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    with locked_folder(tmp_path, "job_alive.1") as own:
        assert remove_abandoned(tmp_path, DAY_S) == ["job_dead.7"]
        assert sorted(tmp_path.iterdir()) == [own.path, tmp_path / f"{own.path.name}.lock"]


def test_remove_abandoned_keeps_a_folder_whose_owner_cannot_be_recorded(tmp_path: Path):
    (tmp_path / f"job_dead.7.{HOST}").mkdir()
    (lock := tmp_path / f"job_dead.7.{HOST}.lock").touch()
    found = []

    def refuse(name: str) -> None:
        found.append(name)
        assert name in used_folders(tmp_path), "the lock is held meanwhile"
        raise ConnectionError

    for _ in range(2):
        with pytest.raises(ConnectionError):
            remove_abandoned(tmp_path, DAY_S, refuse)
    assert lock.exists()
    assert remove_abandoned(tmp_path, DAY_S, found.append) == ["job_dead.7"]
    assert found == ["job_dead.7"] * 3
    assert not list(tmp_path.iterdir())


def test_remove_abandoned_finds_nothing_where_there_is_no_folder(tmp_path: Path):
    assert remove_abandoned(tmp_path / "scratch", DAY_S) == []
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("host", ["elsewhere.example", f"elsewhere.{HOST}"])
def test_remove_abandoned_proves_nothing_by_the_locks_of_other_hosts(tmp_path: Path, host: str):
    lock, folder = tmp_path / f"job_1.1.{host}.lock", tmp_path / f"job_1.1.{host}"
    lock.touch()
    folder.mkdir()
    assert remove_abandoned(tmp_path, DAY_S) == []
    assert folder.exists()
    long_ago = time.time() - DAY_S - 60
    os.utime(lock, (long_ago, long_ago))
    assert remove_abandoned(tmp_path, DAY_S) == [], "its age does not prove that its process is dead"
    assert not list(tmp_path.iterdir())


def test_remove_abandoned_does_not_find_a_lock_free_that_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It runs just before the new file is locked, and removes that file only."""
    removed: list[list[str]] = []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append([])
            removed[0] = remove_abandoned(tmp_path, DAY_S)
        fcntl.flock(descriptor, operation)

    with_flock(monkeypatch, remove_first)
    with locked_folder(tmp_path, "job_1.1"):
        assert removed == [[]]
        assert list(used_folders(tmp_path)) == ["job_1.1"]


def with_flock(monkeypatch: pytest.MonkeyPatch, flock: Callable[[Any, int], None]) -> None:
    monkeypatch.setattr(folders, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": flock}))


def test_locks_are_taken_on_files_that_are_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS refuses the others."""

    def as_on_nfs(file: Any, operation: int) -> None:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        fcntl.flock(file, operation)

    with_flock(monkeypatch, as_on_nfs)
    (tmp_path / f"job_dead.7.{HOST}.lock").touch()
    with locked_folder(tmp_path, "job_1.1"):
        assert list(used_folders(tmp_path)) == ["job_1.1"]
        assert remove_abandoned(tmp_path, DAY_S) == ["job_dead.7"]


def test_a_folder_that_cannot_be_removed_keeps_its_lock_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as refused:
        refused.setattr(shutil, "rmtree", lambda *_, **__: None)
        with locked_folder(tmp_path, "job_1.1") as own:
            pass
        assert remove_abandoned(tmp_path, DAY_S) == []
        assert own.path.exists()
    assert remove_abandoned(tmp_path, DAY_S) == ["job_1.1"]
    assert not list(tmp_path.iterdir())


def test_locked_folder_leaves_nothing_open_if_it_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patched:
        with_flock(patched, refuse)
        with pytest.raises(OSError, match="No locks available"), locked_folder(tmp_path, "job_1.1"):
            pass
    open_here = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in open_here if path.startswith(str(tmp_path))]
    assert remove_abandoned(tmp_path, DAY_S) == []
    assert not list(tmp_path.iterdir())
