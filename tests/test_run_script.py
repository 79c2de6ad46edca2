"""The script `run` without a network: its commands, its errors, and its installation with a fake Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from base.defaults import DEFAULT_URL

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "test", "up", "cluster", "check", "audit", "distillery", "setup", "help")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A fresh checkout: the script and the files that it reads."""
    for name in ("run", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    basic = {"PATH": os.environ["PATH"], "HOME": str(checkout)}
    return subprocess.run(
        [checkout / "run", *arguments],
        env={**basic, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def stamp(checkout: Path, level: str) -> None:
    sums = subprocess.run(
        ["cksum", "pyproject.toml", "constraints.txt"], cwd=checkout, capture_output=True, text=True, check=True
    )
    (checkout / ".venv/.ready").write_text(f"{level}\n{sums.stdout}")


@pytest.fixture
def ready(checkout: Path) -> Path:
    """A checkout with everything installed. Its programs only print their arguments."""
    for name in ("python", "distillery"):
        program(checkout / ".venv/bin" / name, f'echo "{name} $*"; echo "bytecode ${{PYTHONDONTWRITEBYTECODE-on}}"')
    stamp(checkout, "dev")
    return checkout


def test_help_lists_every_command(checkout: Path):
    for arguments in ([], ["help"], ["--help"]):
        shown = run(checkout, *arguments)
        assert shown.returncode == 0
        for command in COMMANDS:
            assert f"./run {command} " in shown.stdout
        assert DEFAULT_URL in shown.stdout


def test_unknown_command_is_refused_and_installs_nothing(checkout: Path):
    shown = run(checkout, "dmeo")
    assert shown.returncode == 2
    assert "there is no command 'dmeo'" in shown.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "executed"),
    [
        (["demo", "--seeds", "1"], "distillery demo --seeds 1"),
        (["up", "--port", "9"], "distillery up --port 9"),
        (["distillery", "list", "--status", "a b"], "distillery list --status a b"),
        (["cluster"], "python -m local.cluster"),
        (
            ["audit", "--fix"],
            "python -m pip_audit --strict --disable-pip --no-deps --requirement constraints.txt --fix",
        ),
        (["test", "tests/client", "-x"], "python -m pytest tests/client -x"),
    ],
)
def test_command_in_a_ready_environment_installs_nothing(ready: Path, arguments: list[str], executed: str):
    done = run(ready, *arguments, PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, done.stdout) == (0, f"{executed}\nbytecode on\n"), done.stderr


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        ("demo", "timm,onnx"),
        ("up", "timm,onnx"),
        ("distillery", "timm,onnx"),
        ("cluster", "timm,onnx,cluster"),
        ("check", "dev"),
        ("audit", "dev"),
        ("test", "dev"),
        ("setup", "dev"),
    ],
)
def test_command_installs_the_extras_that_it_needs(ready: Path, command: str, extras: str):
    (ready / ".venv/.ready").unlink()
    assert f"--editable .[{extras}]\n" in run(ready, command).stdout


def test_command_adds_extras_and_never_removes_any(ready: Path):
    stamp(ready, "service")
    for command, installs in [
        ("up", None),
        ("cluster", "timm,onnx,cluster"),
        ("up", None),
        ("test", "dev"),
        ("cluster", None),
    ]:
        done = run(ready, command)
        assert ("pip install" in done.stdout) is (installs is not None), command
        assert installs is None or f".[{installs}]" in done.stdout
    with (ready / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    assert "--editable .[dev]\n" in run(ready, "up").stdout, "all that was installed is brought up to date"


def test_test_runs_in_several_processes(ready: Path):
    assert run(ready, "test").stdout.startswith("python -m pytest -n ")
    assert run(ready, "test", DISTILLERY_TEST_PROCESSES="7").stdout.startswith(
        "python -m pytest -n 7 --dist worksteal\n"
    )


def test_setup_installs_again_after_a_change_of_pyproject(ready: Path):
    with (ready / "pyproject.toml").open("a") as pyproject:
        pyproject.write("# changed\n")
    done = run(ready, "setup")
    assert done.returncode == 0, done.stderr
    assert "installing dependencies" in done.stderr
    assert "python -m pip install" in done.stdout
    assert run(ready, "setup").stderr == ""


def test_setup_that_failed_leaves_no_stamp_and_no_lock(ready: Path):
    (ready / ".venv/.ready").unlink()
    program(ready / ".venv/bin/python", '[ "$3" = --version ]')
    done = run(ready, "setup")
    assert done.returncode == 1
    assert "pip could not install" in done.stderr
    assert not (ready / ".venv/.ready").exists()
    assert not (ready / ".venv/.lock").exists()


def test_setup_removes_half_an_environment_and_names_the_missing_package(checkout: Path, tmp_path: Path):
    """Debian's python3 without python3-venv: the version is new enough, but the venv module fails half-way."""
    half = 'case "$1 $2" in "-m venv") mkdir -p "$3/bin"; exit 1;; esac'
    python = program(tmp_path / "old" / "python3", half)
    done = run(checkout, "setup", PYTHON=str(python))
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_setup_refuses_an_old_python(checkout: Path, tmp_path: Path):
    names = ("python3", "python3.11", "python3.12", "python3.13", "python3.14", "python")
    for name in names:
        program(tmp_path / "old" / name, "exit 1")
    done = run(checkout, "setup", PATH=f"{tmp_path / 'old'}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr


def test_setup_takes_over_the_lock_of_a_dead_process(ready: Path):
    (ready / ".venv/.ready").unlink()
    gone = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout
    (ready / ".venv/.lock").write_text(gone)
    assert run(ready, "setup").returncode == 0
    assert not (ready / ".venv/.lock").exists()


def test_setup_twice_at_once_installs_once(ready: Path):
    (ready / ".venv/.ready").unlink()
    program(ready / ".venv/bin/python", f'[ "$3" != install ] || {{ echo x >>"{ready}/installs"; sleep 1; }}')
    both = [subprocess.Popen([ready / "run", "setup"], stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [one.wait(30) for one in both] == [0, 0]
    assert (ready / "installs").read_text() == "x\n"
