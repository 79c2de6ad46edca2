"""Scratch folders: gone after use, after an exception, and after a kill."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.table import REPOSITORY
from worker.scratch import scratch_folder, sweep


def test_a_folder_is_there_for_as_long_as_it_is_used(tmp_path: Path):
    with scratch_folder(tmp_path / "scratch", "one") as folder:
        (folder / "file").write_text("x")
        assert sweep(tmp_path / "scratch") == []
        assert (folder / "file").exists()
    assert not list((tmp_path / "scratch").iterdir())


def test_an_exception_removes_it_too(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path, "one"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept(tmp_path: Path):
    program = (
        "import os, pathlib, sys\n"
        "from worker.scratch import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1]), 'dead') as folder:\n"
        "    (folder / 'file').write_text('x')\n"
        "    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, check=False)
    with scratch_folder(tmp_path, "alive") as alive:
        assert sweep(tmp_path) == [tmp_path / "dead"]
        assert sorted(tmp_path.iterdir()) == [alive, tmp_path / "alive.lock"]


def test_the_same_name_can_be_used_again(tmp_path: Path):
    for _ in range(2):
        with scratch_folder(tmp_path, "one") as folder:
            assert not list(folder.iterdir())
