"""Negative controls: each takes one promise out of a copy of the code, and the tests that are named for it must fail.

A test that still passes without the promise proves nothing about it. The copy as it is must pass them all.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COPIED = ("base", "kdcore", "local", "migrations", "store", "tests/base", "tests/store", "tests/worker", "worker")
FLAGS = ("-p", "no:xdist", "-p", "no:cacheprovider", "--color=no", "-rpf", "-k", "not postgres")
TOLD = re.compile(r"^(PASSED|FAILED) ([^\s\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class Edit:
    """One place in one file."""

    file: str
    what: str
    instead: str

    def apply(self, copy: Path) -> None:
        path = copy / self.file
        text = path.read_text()
        assert text.count(self.what) == 1, f"{self.file} says {text.count(self.what)} times: {self.what}"
        path.write_text(text.replace(self.what, self.instead))


@dataclass(frozen=True)
class Control:
    """A promise taken out, and the tests that keep it. Where no disk can be mounted, `cut` are skipped."""

    edit: Edit
    tests: tuple[str, ...]
    cut: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.tests, *(f"tests/store/test_power_cut.py::{name}" for name in self.cut))


CONTROLS = {
    "who lost a job may not write": Control(
        Edit("store/fence.py", "jobs.c.fence == fence, ", ""),
        (
            "tests/store/test_lifecycle.py::test_whoever_lost_the_job_is_refused_every_write",
            "tests/store/test_lifecycle.py::test_whoever_lost_the_job_cannot_end_it",
        ),
    ),
    "a training is dead before its lease ends": Control(
        Edit("worker/guard.py", "if time.clock_gettime(CLOCK) >= deadline:", "if False:"),
        ("tests/worker/test_guard.py::test_a_passed_deadline_kills_the_whole_session",),
    ),
    "a training dies with its worker": Control(
        Edit(
            "worker/guard.py",
            "if not lines:\n                os.killpg(0, signal.SIGKILL)",
            "if not lines:\n                continue",
        ),
        ("tests/worker/test_guard.py::test_a_closed_pipe_kills_the_whole_session",),
    ),
    "a lease counts from before it was asked for": Control(
        Edit(
            "worker/heart.py",
            "            self.reached = True",
            "            self.reached = True\n            self.deadline = boottime() + SAFE_PART * lease_s",
        ),
        ("tests/worker/test_heart.py::test_a_late_answer_stretches_no_deadline",),
    ),
    "who could not listen may not rescue": Control(
        Edit("base/clock.py", "now - self._since >= duration_s", "True"),
        (
            "tests/base/test_clock.py::test_contact_counts_from_the_first_answer",
            "tests/base/test_clock.py::test_an_outage_starts_the_count_again",
        ),
    ),
    "a silent owner keeps its job until somebody patient comes": Control(
        Edit("store/lifecycle.py", " if rescue else _due(waiting)", ""),
        ("tests/store/test_lifecycle.py::test_a_lapsed_lease_is_rescued_only_when_asked",),
    ),
    "results appear with success or not at all": Control(
        Edit(
            "store/lifecycle.py",
            'change(connection, mine(job_id, fence), **_ended("succeeded")',
            'publish(connection, job_id, artifacts) or change(connection, mine(job_id, fence), **_ended("succeeded")',
        ),
        ("tests/store/test_lifecycle.py::test_another_end_than_the_one_that_stands_is_refused",),
    ),
    "a stored file keeps its name": Control(
        Edit("base/files.py", "os.fsync(descriptor)", "pass"),
        ("tests/store/test_blobs.py::test_nothing_has_its_name_before_it_is_durable_and_the_folder_is_synced_after",),
        cut=(
            "test_a_checkpoint_that_was_stored_is_there_and_whole",
            "test_a_published_result_is_there_and_whole",
            "test_every_acknowledged_part_of_an_upload_is_there",
        ),
    ),
    "a stored file keeps its bytes": Control(
        Edit("store/blobs.py", "os.fsync(file.fileno())", "pass"),
        ("tests/store/test_blobs.py::test_nothing_has_its_name_before_it_is_durable_and_the_folder_is_synced_after",),
        cut=("test_a_published_result_is_there_and_whole",),
    ),
    "the engine's files keep their names": Control(
        Edit("base/files.py", "sync(path.parent)", "pass"),
        ("tests/base/test_files.py::test_nothing_has_its_name_before_it_is_durable_and_the_folder_is_synced_after",),
        cut=("test_what_the_engine_writes_whole_is_there",),
    ),
    "SQLite keeps what it acknowledged": Control(
        Edit("store/engines.py", "synchronous = FULL", "synchronous = NORMAL"),
        ("tests/store/test_database.py::test_sqlite_keeps_what_it_acknowledged",),
        cut=("test_a_migrated_database_and_every_accepted_job_are_there",),
    ),
}

HURRY = Edit(
    "tests/worker/test_guard.py", 'SLEEP = "import time; time.sleep(600)"', 'SLEEP = "import time; time.sleep(4)"'
)
"""What nobody kills ends by itself, and the test that waits for it to be killed fails at once."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        # Bytecode comes along, apart from what another test process is just writing.
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc.*"))
    for name in (
        "pyproject.toml",
        "tests/__init__.py",
        "tests/clock.py",
        "tests/conftest.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    HURRY.apply(tmp_path)
    return tmp_path


def outcomes(copy: Path, tests: list[str]) -> dict[str, set[str]]:
    """By test, what became of its cases; nothing for one that was skipped."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *FLAGS, *tests]
    run = subprocess.run(command, cwd=copy, env=ours, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    told: dict[str, set[str]] = {test: set() for test in tests}
    for outcome, test in TOLD.findall(run.stdout):
        told[test].add(outcome)
    return told


def test_all_pass_in_an_untouched_copy(copy: Path):
    told = outcomes(copy, sorted({test for control in CONTROLS.values() for test in control.all}))
    assert {test for test, outcome in told.items() if "FAILED" in outcome} == set()
    assert [test for control in CONTROLS.values() for test in control.tests if told[test] != {"PASSED"}] == []


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_without_the_promise_they_fail(control: Control, copy: Path):
    control.edit.apply(copy)
    told = outcomes(copy, list(control.all))
    assert [test for test, outcome in told.items() if outcome == {"PASSED"}] == []
    assert [test for test in control.tests if "FAILED" not in told[test]] == []
