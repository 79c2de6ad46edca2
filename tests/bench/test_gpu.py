"""The parts of the GPU's bench that need no GPU, and the reading of a half of CIFAR-100."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import gpu
from bench.gpu import Bench, difference, report, run_apart, run_part, used_mib, write_inputs
from kdcore.spec import METHODS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("gpu")
    write_inputs(folder, None, None)
    return Bench(folder, "cpu", smoke=True)


def test_run_part_a_cpu_agrees_with_itself(bench: Bench) -> None:
    found = {one["what"]: one["found"] for one in run_part("precision", bench)}
    assert found.pop("seconds") > 0
    assert len(found) == 8 and set(found.values()) == {0.0}


def test_run_part_the_optimizer_of_a_graph_is_close_to_the_usual_one(bench: Bench) -> None:
    found = {one["what"]: one["found"] for one in run_part("equality", bench)}
    assert found["fp32: fused repeats itself"] == 0
    assert found["fp32: usual optimizer and fused"] < 1e-5


def test_run_part_each_case_of_capture_repeats_itself_on_a_cpu(bench: Bench) -> None:
    found = {one["what"]: one["found"] for one in run_part("capture", bench)}
    assert found.pop("seconds") > 0
    assert found.keys() == {*METHODS, *gpu.RECIPES}
    assert {name: one.get("error", one.get("difference")) for name, one in found.items()} == dict.fromkeys(found, 0)


@pytest.mark.slow
def test_run_part_a_training_is_killed_while_it_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a GPU of which half is used as long as the training lives, and for one look longer."""
    seen = iter([100, 4000, 4000, 110])
    monkeypatch.setattr(gpu, "used_mib", lambda: next(seen))
    found = {one["what"]: one["found"] for one in run_part("killed", bench)}
    assert (found["reached"], found["before"], found["during"], found["after"]) == (True, 100, 4000, 110)
    assert next(seen, None) is None and "error" not in found


def test_the_process_that_is_to_be_killed_ends_without_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = []
    monkeypatch.setattr(gpu, "hold", held.append)
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke", "--part", "hold", "--folder", str(tmp_path)])
    assert gpu.main() == 0 and capsys.readouterr().out == ""
    assert [(one.device, one.smoke) for one in held] == [("cpu", True)]


def test_run_part_speed_compares_with_the_plain_loop(bench: Bench) -> None:
    found = {one["what"]: one["found"] for one in run_part("speed", bench)}
    assert found["batch 16: plain, fp32"]["x plain fp32"] == 1
    assert found["batch 16: ours eager, fp32"]["images/s"] > 0


def test_run_part_an_error_is_a_finding(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Bench) -> dict[str, float]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setitem(gpu.PARTS, "equality", broken)
    error, seconds = run_part("equality", bench)
    assert error["found"] == "RuntimeError: CUDA error: device-side assert triggered"
    assert seconds["what"] == "seconds" and "device-side assert" in report([error, seconds])


def test_run_apart_goes_on_after_the_case_that_ended_the_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], stdout: io.TextIOBase, **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        case = "dml" if "--after" in command else "supervised"
        stdout.write(json.dumps({"part": "capture", "what": case, "found": {"captured": False}}) + "\n")
        return subprocess.CompletedProcess(command, 0 if "--after" in command else gpu.FAULT)

    monkeypatch.setattr(subprocess, "run", run)
    found = list(run_apart("capture", bench, 100))
    assert [one["what"] for one in found] == ["supervised", "dml"]
    assert commands[1][-2:] == ["--after", "supervised"] and commands[0][:3] == [sys.executable, "-m", "bench.gpu"]


def test_run_apart_a_part_that_takes_too_long_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    (error,) = run_apart("speed", bench, 7)
    assert "the limit of 7 s" in error["found"]


def test_difference_is_relative_to_the_largest_value() -> None:
    one, other = {"a": torch.tensor([4.0, 1.0])}, {"a": torch.tensor([4.0, 1.5])}
    assert difference(one, one) == 0 and difference(one, other) == pytest.approx(0.125)
    assert difference({"a": torch.tensor(1.0)}, {"a": torch.tensor(torch.nan)}) == torch.inf


def test_used_mib_is_none_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert used_mib() is None


def test_write_inputs_reads_a_half_of_cifar100(tmp_path: Path) -> None:
    """Two strips of two images each, packed as the real halves are; images and labels stay together."""
    packed: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        strips = []
        for first in (0, 2):
            pixels = np.repeat(np.arange(first, first + 2, dtype=np.uint8) * 50, 32 * 32 * 3).reshape(64, 32, 3)
            with io.BytesIO() as file:
                Image.fromarray(pixels).save(file, "WEBP", lossless=True)
                strips.append(np.frombuffer(file.getvalue(), dtype=np.uint8))
        packed[f"webp_{split}"] = np.concatenate(strips)
        packed[f"off_{split}"] = np.cumsum([0, *map(len, strips)])
        packed[f"y_{split}"] = np.arange(4, dtype=np.uint8)
    np.savez(tmp_path / "half.npz", **packed)
    write_inputs(tmp_path / "out", tmp_path / "half.npz", None)
    with np.load(tmp_path / "out" / "data.npz") as data:
        assert data["x_train"].shape == (4, 32, 32, 3) and sorted(data["y_train"]) == [0, 1, 2, 3]
        assert all((pixels == 50 * label).all() for pixels, label in zip(data["x_train"], data["y_train"], strict=True))
