"""Negative controls: each breaks one promise in a copy of the code, and the tests that check it must fail there.

A test that passes without its promise proves nothing. All tests must pass in the unchanged copy.
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
OUTCOME = re.compile(r"^(PASSED|FAILED) ([^\s\[]+)", re.MULTILINE)


@dataclass(frozen=True)
class Edit:
    """A replacement in one file, of a text that is there once."""

    file: str
    old: str
    new: str

    def apply(self, copy: Path) -> None:
        path = copy / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{self.file} has {text.count(self.old)} times: {self.old}"
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True)
class Control:
    """An edit that breaks a promise, and the tests that check it. `cut` are skipped if no disk can be mounted."""

    edit: Edit
    tests: tuple[str, ...]
    cut: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.tests, *(f"tests/store/test_power_cut.py::{name}" for name in self.cut))


CONTROLS = {
    "an attempt that has lost its job may not write": Control(
        Edit("store/fence.py", "jobs.c.fence == fence, ", ""),
        (
            "tests/store/test_lifecycle.py::test_whoever_lost_the_job_is_refused_every_write",
            "tests/store/test_lifecycle.py::test_whoever_lost_the_job_cannot_end_it",
        ),
    ),
    "a training is dead before its lease ends": Control(
        Edit("worker/guard.py", "if time.clock_gettime(CLOCK) >= deadline:", "if False:"),
        ("tests/worker/test_guard.py::test_guard_kills_the_whole_session_at_its_deadline",),
    ),
    "a training dies with its worker": Control(
        Edit(
            "worker/guard.py",
            "if not lines:\n                os.killpg(0, signal.SIGKILL)",
            "if not lines:\n                continue",
        ),
        ("tests/worker/test_guard.py::test_guard_kills_the_whole_session_when_its_pipe_is_closed",),
    ),
    "a lease counts from before its heartbeat": Control(
        Edit(
            "worker/lease.py",
            "            self.accepted = True",
            "            self.accepted = True\n            self.deadline = boottime() + SAFE_PART * lease_s",
        ),
        ("tests/worker/test_lease.py::test_heartbeat_deadline_is_not_extended_by_a_late_answer",),
    ),
    "a process without a lease of contact may not take over a job": Control(
        Edit("base/clock.py", "now - self._since >= duration_s", "True"),
        (
            "tests/base/test_clock.py::test_contact_counts_from_the_first_answer",
            "tests/base/test_clock.py::test_contact_counts_again_after_an_outage",
        ),
    ),
    "a job with an expired lease is taken over only if that is allowed": Control(
        Edit("store/lifecycle.py", " if rescue else _due(waiting)", ""),
        ("tests/store/test_lifecycle.py::test_a_lapsed_lease_is_rescued_only_when_asked",),
    ),
    "results appear with the success or not at all": Control(
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

SHORT_SLEEP = Edit(
    "tests/worker/test_guard.py", 'SLEEP = "import time; time.sleep(600)"', 'SLEEP = "import time; time.sleep(4)"'
)
"""Processes that are not killed end soon, so that the test that waits for it fails soon."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in COPIED:
        # Bytecode is copied too, except files that another test process is writing.
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc.*"))
    for name in ("pyproject.toml", "tests/__init__.py", "tests/clock.py", "tests/conftest.py"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    SHORT_SLEEP.apply(tmp_path)
    return tmp_path


def run_tests(copy: Path, tests: list[str]) -> dict[str, set[str]]:
    """The outcomes of the cases of each test; an empty set if it was skipped."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", *FLAGS, *tests]
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    outcomes: dict[str, set[str]] = {test: set() for test in tests}
    for outcome, test in OUTCOME.findall(run.stdout):
        outcomes[test].add(outcome)
    return outcomes


def test_controls_pass_in_an_unchanged_copy(copy: Path):
    outcomes = run_tests(copy, sorted({test for control in CONTROLS.values() for test in control.all}))
    assert {test for test, outcome in outcomes.items() if "FAILED" in outcome} == set()
    assert [test for control in CONTROLS.values() for test in control.tests if outcomes[test] != {"PASSED"}] == []


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_controls_fail_without_the_promise(control: Control, copy: Path):
    control.edit.apply(copy)
    outcomes = run_tests(copy, list(control.all))
    assert [test for test, outcome in outcomes.items() if outcome == {"PASSED"}] == []
    assert [test for test in control.tests if "FAILED" not in outcomes[test]] == []
