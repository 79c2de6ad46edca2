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
COPIED = (
    "base",
    "kdcore",
    "local",
    "migrations",
    "proofs/power_cuts",
    "store",
    "tests/base",
    "tests/store",
    "tests/worker",
    "worker",
)
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
        return (*self.tests, *(f"proofs/power_cuts/test_power_cut.py::{name}" for name in self.cut))


CONTROLS = {
    "a stale attempt may not write": Control(
        Edit("store/attempts.py", "jobs.c.fence == fence, ", ""),
        (
            "tests/store/test_lifecycle.py::test_stale_attempt_is_refused_every_write",
            "tests/store/test_lifecycle.py::test_stale_attempt_cannot_end_the_job",
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
    "a process without contact may not take over": Control(
        Edit("base/clock.py", "now - self._since >= duration_s", "True"),
        (
            "tests/base/test_clock.py::test_contact_counts_from_the_first_answer",
            "tests/base/test_clock.py::test_contact_counts_again_after_an_outage",
        ),
    ),
    "an expired lease is taken over only with takeover": Control(
        Edit("store/lifecycle.py", " if takeover else can_start", ""),
        ("tests/store/test_lifecycle.py::test_claim_takes_over_an_expired_lease_only_with_takeover",),
    ),
    "results appear with the success or not at all": Control(
        Edit(
            "store/lifecycle.py",
            'job = update_job(connection, owned_by(job_id, fence), **_ended("succeeded")',
            "publish(connection, job_id, artifacts)\n"
            '    job = update_job(connection, owned_by(job_id, fence), **_ended("succeeded")',
        ),
        ("tests/store/test_lifecycle.py::test_finish_after_another_finish_is_refused",),
    ),
    "a stored file keeps its name": Control(
        Edit("base/files.py", "os.fsync(descriptor)", "pass"),
        ("tests/store/test_file_store.py::test_put_stream_syncs_the_file_then_renames_then_syncs_the_folder",),
        cut=(
            "test_put_checkpoint_survives_a_power_cut",
            "test_put_file_and_finish_succeeded_survive_a_power_cut",
            "test_upload_parts_survive_a_power_cut",
        ),
    ),
    "a stored file keeps its bytes": Control(
        Edit("store/file_store.py", "os.fsync(file.fileno())", "pass"),
        ("tests/store/test_file_store.py::test_put_stream_syncs_the_file_then_renames_then_syncs_the_folder",),
        cut=("test_put_file_and_finish_succeeded_survive_a_power_cut",),
    ),
    "the engine's files keep their names": Control(
        Edit("base/files.py", "sync(path.parent)", "pass"),
        ("tests/base/test_files.py::test_write_text_syncs_the_file_then_renames_then_syncs_the_folder",),
        cut=("test_write_text_survives_a_power_cut",),
    ),
    "SQLite keeps what it acknowledged": Control(
        Edit("store/database.py", "synchronous = FULL", "synchronous = NORMAL"),
        ("tests/store/test_database.py::test_sqlite_engine_sets_pragmas_that_survive_a_power_cut",),
        cut=("test_migrate_and_submit_survive_a_power_cut",),
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
    for name in (
        "pyproject.toml",
        "conftest.py",
        "proofs/__init__.py",
        "tests/__init__.py",
        "tests/clock.py",
        "tests/disks.py",
    ):
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
