import ast
import json
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from client import demo as module
from client.demo import SCRIPT, CheckFailed, check_measured, demo, measure_in_plain_torch, report_of, student_spec
from client.errors import Unreachable
from kdcore import models
from kdcore.classifier import Classifier
from tests.client.console import console, printed
from tests.client.fake_service import job, report

MEASURED = {"parameters": 1030, "correct": 380, "test_samples": 400}


def test_check_measured_compares_with_the_report():
    assert check_measured(MEASURED, 0.95, 1030) == "as in the report"
    one_apart = "one image apart from the report (380 of 400 answers are right, in the report 381)"
    assert check_measured(MEASURED, 381 / 400, 1030).startswith(one_apart)
    with pytest.raises(CheckFailed, match="1030 parameters, the report has 1031"):
        check_measured(MEASURED, 0.95, 1031)
    with pytest.raises(CheckFailed, match="differs from its report: 380 of 400 answers are right, in the report 382"):
        check_measured(MEASURED, 382 / 400, 1030)


def test_use_student_imports_torch_and_safetensors_only():
    tree = ast.parse(SCRIPT.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {
        name for node in imports for name in ([node.module] if isinstance(node, ast.ImportFrom) else _names(node))
    }
    assert modules == {"json", "sys", "pathlib", "typing", "torch", "safetensors"}


def _names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]


@pytest.mark.parametrize("channels", [1, 3])
def test_use_student_has_the_engines_network(channels: int, tmp_path: Path):
    """It has the outputs of the engine's convnet4, with random weights and running averages."""
    torch.manual_seed(0)
    network = models.build("convnet4", 5, channels)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    mean, std = [0.4] * channels, [0.3] * channels
    facts = {"architecture": "convnet4", "channels": channels, "num_classes": 5, "mean": mean, "std": std}
    save_file(network.state_dict(), tmp_path / "s.safetensors", {"distillery": json.dumps(facts)})
    pixels = torch.randint(256, (64, channels, 9, 7), dtype=torch.uint8)
    plain = runpy.run_path(str(SCRIPT))
    loaded, known = plain["load"](tmp_path / "s.safetensors")
    expected = Classifier(network.eval(), mean, std)(pixels).logits
    torch.testing.assert_close(loaded((pixels.float() / 255 - 0.4) / 0.3), expected)
    assert plain["predict"](loaded, known, pixels).tolist() == expected.argmax(1).tolist()


def test_measure_in_plain_torch_fails_with_the_scripts_error(tmp_path: Path):
    (tmp_path / "student.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckFailed, match="could not be measured"):
        measure_in_plain_torch(tmp_path / "student.safetensors", tmp_path / "cache")


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
    assert "Loaded in plain PyTorch in another process: 1,030 parameters" in printed(screen)
    assert "as in the report." in printed(screen)
    assert (tmp_path / "out" / "use_student.py").read_bytes() == SCRIPT.read_bytes()
    assert "student alone" in printed(screen)
    assert (tmp_path / "out" / "student.safetensors").stat().st_size > 4_000
    assert (tmp_path / "out" / "data" / "distillery.db").exists()
    pid = json.loads((tmp_path / "out" / "data" / "ready.json").read_text())["pid"]
    assert subprocess.run(["kill", "-0", str(pid)], capture_output=True, check=False).returncode != 0
