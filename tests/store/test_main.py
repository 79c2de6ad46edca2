import os
import subprocess
import sys
from pathlib import Path


def test_the_command_makes_the_tables_and_says_where(tmp_path: Path):
    environment = {**os.environ, "DISTILLERY_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "store", "migrate"]
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"sqlite:///{tmp_path}/distillery.db is up to date\n"
    assert (tmp_path / "distillery.db").exists()


def test_without_a_command_it_says_which_there_are():
    done = subprocess.run([sys.executable, "-m", "store"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "COMMAND" in done.stderr
