"""Scratch folders: gone after use, after an exception, and after a kill, which is then known."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.worker.table import REPOSITORY
from worker.scratch import FOREIGN_AFTER_S, Dead, scratch_folder, sweep


def test_a_folder_is_there_for_as_long_as_it_is_used(tmp_path: Path):
    with scratch_folder(tmp_path / "scratch", "job_1", 1) as folder:
        (folder / "file").write_text("x")
        assert sweep(tmp_path / "scratch") == []
        assert (folder / "file").exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_an_exception_removes_it_too(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path, "job_1", 1):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept_and_told(tmp_path: Path):
    program = (
        "import os, pathlib, sys\n"
        "from worker.scratch import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1]), 'job_dead', 7) as folder:\n"
        "    (folder / 'file').write_text('x')\n"
        "    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    with scratch_folder(tmp_path, "job_alive", 1) as alive:
        assert sweep(tmp_path) == [Dead("job_dead", 7)]
        assert sorted(tmp_path.iterdir()) == [alive, tmp_path / f"{alive.name}.lock"]


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
        with scratch_folder(tmp_path, "job_1", 1) as folder:
            assert not list(folder.iterdir())
