import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from client import demo as module
from client.demo import CheckFailed, check_measured, demo, report_of, student_spec
from client.errors import Unreachable
from tests.client.console import console, printed
from tests.client.fake_service import job, report

MEASURED = {"parameters": 1030, "accuracy": 0.95, "test_samples": 400}


def test_check_measured_compares_with_the_report():
    check_measured(MEASURED, 0.95, 1030)
    with pytest.raises(CheckFailed, match="1030 parameters, the report has 1031"):
        check_measured(MEASURED, 0.95, 1031)
    with pytest.raises(CheckFailed, match=r"accuracy is 0\.9500, the report has 0\.9600"):
        check_measured(MEASURED, 0.96, 1030)


def test_check_gain_fails_without_a_gain():
    module._check_gain([report(0.95, 0.9), report(0.89, 0.9)])
    with pytest.raises(CheckFailed, match="did not help"):
        module._check_gain([report(0.91, 0.9), report(0.89, 0.9)])
    with pytest.raises(CheckFailed, match="no gain"):
        module._check_gain([report(0.95, None)])


def test_report_of_a_job_without_one():
    with pytest.raises(CheckFailed, match="without a report"):
        report_of(job())  # type: ignore[arg-type]


def test_student_spec_has_the_seed_and_a_baseline():
    assert [student_spec("job_1", seed)["training"]["seed"] for seed in (1, 2)] == [1, 2]
    assert student_spec("job_1", 1)["baseline"] == "train"


@pytest.mark.parametrize(
    ("failure", "code", "expected"),
    [
        (CheckFailed("the gain is gone"), 1, "The demo failed: the gain is gone"),
        (Unreachable("http://x", "refused"), 1, "no answer from http://x: refused"),
        (KeyboardInterrupt(), 130, "nothing is left running"),
    ],
)
def test_demo_prints_the_failure_and_the_servers_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int, expected: str
):
    def fails(*_: Any) -> None:
        raise failure

    screen = console()
    monkeypatch.setattr(module, "_distil", fails)
    monkeypatch.setattr(module, "local_server", StoppedServer)
    assert demo(screen, seeds=1, to=tmp_path, keep=False) == code
    assert expected in printed(screen)
    assert ("last line" in printed(screen)) is (code == 1)


class StoppedServer:
    url = "http://127.0.0.1:1"

    def __init__(self, home: Path, slots: int) -> None:
        self.home, self.slots = home, slots

    def __enter__(self) -> "StoppedServer":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def log_tail(self) -> list[str]:
        return ["last line"]


def test_demo_from_nothing_to_a_checked_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real server, engine and files; trained too shortly for the gain to mean anything."""
    screen = console()
    monkeypatch.setitem(module.TEACHER["training"], "epochs", 2)
    monkeypatch.setattr(module, "STUDENT_EPOCHS", 2)
    monkeypatch.setattr(module, "_check_gain", lambda reports: None)
    assert demo(screen, seeds=1, to=tmp_path / "out", keep=True) == 0, printed(screen)
    assert "as in the report" in printed(screen)
    assert "student alone" in printed(screen)
    assert (tmp_path / "out" / "student.safetensors").stat().st_size > 4_000
    assert (tmp_path / "out" / "data" / "distillery.db").exists()
    pid = json.loads((tmp_path / "out" / "data" / "ready.json").read_text())["pid"]
    assert subprocess.run(["kill", "-0", str(pid)], capture_output=True, check=False).returncode != 0
