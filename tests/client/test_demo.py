import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from client import demo as module
from client.demo import CheckFailed
from client.demo import check_measured
from client.demo import demo
from client.demo import report_of
from client.demo import student_spec
from client.errors import Unreachable
from tests.client.fake import job, report

MEASURED = {"parameters": 1030, "accuracy": 0.95, "test_samples": 400}


def test_the_student_must_be_the_one_that_was_reported():
    check_measured(MEASURED, 0.95, 1030)
    with pytest.raises(CheckFailed, match="1030 parameters, its report says 1031"):
        check_measured(MEASURED, 0.95, 1031)
    with pytest.raises(CheckFailed, match=r"accuracy is 0\.9500, its report says 0\.9600"):
        check_measured(MEASURED, 0.96, 1030)


def test_a_distillation_that_did_not_help_fails_the_demo():
    module._check_gain([report(0.95, 0.9), report(0.89, 0.9)])
    with pytest.raises(CheckFailed, match="did not help"):
        module._check_gain([report(0.91, 0.9), report(0.89, 0.9)])
    with pytest.raises(CheckFailed, match="no gain"):
        module._check_gain([report(0.95, None)])


def test_a_job_without_a_report():
    with pytest.raises(CheckFailed, match="without a report"):
        report_of(job())  # type: ignore[arg-type]


def test_each_seed_is_another_job_with_a_baseline():
    assert [student_spec("job_1", seed)["training"]["seed"] for seed in (1, 2)] == [1, 2]
    assert student_spec("job_1", 1)["baseline"] == "train"


@pytest.fixture
def paper() -> Console:
    return Console(file=io.StringIO(), width=120)


def printed(on: Console) -> str:
    assert isinstance(on.file, io.StringIO)
    return on.file.getvalue()


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (CheckFailed("the gain is gone"), 1, "The demo failed: the gain is gone"),
        (Unreachable("http://x", "refused"), 1, "no answer from http://x: refused"),
        (KeyboardInterrupt(), 130, "nothing is left running"),
    ],
)
def test_what_fails_is_told_with_the_servers_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paper: Console, failure: BaseException, code: int, says: str
):
    def fails(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(module, "_distil", fails)
    monkeypatch.setattr(module, "local_server", FakeServer)
    assert demo(paper, seeds=1, to=tmp_path, keep=False) == code
    assert says in printed(paper)
    assert ("last words" in printed(paper)) is (code == 1)


class FakeServer:
    url = "http://127.0.0.1:1"

    def __init__(self, home: Path, slots: int) -> None:
        self.home, self.slots = home, slots

    def __enter__(self) -> "FakeServer":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def log_tail(self) -> list[str]:
        return ["last words"]


def test_the_demo_from_nothing_to_a_checked_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paper: Console):
    """The real server, engine and files; trained too shortly for the gain to mean anything."""
    monkeypatch.setitem(module.TEACHER["training"], "epochs", 2)
    monkeypatch.setattr(module, "STUDENT_EPOCHS", 2)
    monkeypatch.setattr(module, "_check_gain", lambda reports: None)
    assert demo(paper, seeds=1, to=tmp_path / "out", keep=True) == 0, printed(paper)
    assert "as the report says" in printed(paper)
    assert "student alone" in printed(paper)
    assert (tmp_path / "out" / "student.safetensors").stat().st_size > 4_000
    assert (tmp_path / "out" / "data" / "distillery.db").exists()
    pid = json.loads((tmp_path / "out" / "data" / "ready.json").read_text())["pid"]
    assert subprocess.run(["kill", "-0", str(pid)], capture_output=True, check=False).returncode != 0
