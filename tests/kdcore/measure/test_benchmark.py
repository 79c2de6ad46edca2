"""Benchmarks: what is counted by hand, and that a file's figures are those of its own network."""

import json

import pytest
import torch
from torch import nn

from base.errors import TeacherMismatch
from kdcore import models
from kdcore.exports import FileRow, child
from kdcore.measure import benchmark
from kdcore.measure.benchmark import latency_of, multiplications, run_benchmark
from kdcore.protocol import EXIT_STOPPED
from kdcore.spec import BenchmarkSpec
from kdcore.spec.measured import benchmark_key, files_row
from tests.kdcore.engine import events, workspace, write_teacher

CPU = torch.device("cpu")
KEY = "0" * 64
SHAPE = {"num_classes": 3, "channels": 1, "image_size": [8, 8]}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(child, "LATENCY_S", 0.0)


def asked(**fields) -> BenchmarkSpec:
    return BenchmarkSpec.parse(
        {"key": KEY, "architecture": "convnet4", "batch_size": 2, "threads": 1, **SHAPE, **fields}
    )


def test_multiplications_are_those_of_one_image_counted_by_hand():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    assert multiplications(linear, 1, (4, 4)) == 16 * 3
    padded = nn.Conv2d(2, 4, 3, padding=1)
    assert multiplications(padded, 2, (8, 8)) == 8 * 8 * 4 * 2 * 9
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(4, 5, 1, stride=2))
    assert multiplications(depthwise, 4, (8, 8)) == 8 * 8 * 4 * 9 + 4 * 4 * 5 * 4


def test_run_benchmark_of_a_listed_architecture_says_size_and_speed(tmp_path):
    where, stream = workspace(tmp_path)
    report = run_benchmark(asked(), where)
    network = models.build("convnet4", 3, 1)
    assert report["parameters"] == sum(one.numel() for one in network.parameters()) == 967
    assert report["macs"] == multiplications(network.eval(), 1, (8, 8)) > 0
    assert (report["image_size"], report["batch_size"], report["threads"]) == ([8, 8], 2, 1)
    (row,) = report["files"]
    assert row["runtime"] == f"torch {torch.__version__}" and row["bytes"] == report["bytes"]
    assert [one["batch"] for one in row["latency"]] == [1, 2]
    assert all(0 < one["p50_ms"] <= one["p95_ms"] for one in row["latency"])
    assert report["device"] == row["device"] == {"kind": "cpu", "name": row["cpu"]} and row["cpu"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [line["name"] for line in events(stream, "artifact")] == ["report.json"]


def test_run_benchmark_of_weights_runs_their_own_network(tmp_path):
    path = write_teacher(tmp_path / "teacher.safetensors")
    where, _ = workspace(tmp_path)
    report = run_benchmark(asked(architecture="convnet8", weights=f"file:{path}"), where)
    assert report["architecture"] == "convnet8"
    with pytest.raises(TeacherMismatch, match="the file has 3 outputs, and 5 are asked for"):
        run_benchmark(asked(architecture="convnet8", weights=f"file:{path}", num_classes=5), where)


def test_run_benchmark_runs_files_of_other_formats_on_noise_and_keeps_none(tmp_path, monkeypatch):
    """The file has the network's own weights and shape; nothing is said of its answers."""
    seen = []

    def made(exporter, student, options, data, where):
        seen.append((exporter.format, options.batch_size, options.tolerance, tuple(data.test.pixels.shape)))
        assert student.class_names == ["0", "1", "2"] and (where.out / "student.py").exists()
        (where.out / exporter.file).write_text("a file")
        latency = [{"batch": 1, "p50_ms": 1.0, "p95_ms": 2.0}]
        return FileRow(
            exporter.file, exporter.format, "onnxruntime 1", bytes=6, sha256="0", accuracy=0.3, agreement=0.9,
            images=64, latency=latency, threads=1, cpu="fast",
        )  # fmt: skip

    monkeypatch.setattr(benchmark, "make", made)
    where, _ = workspace(tmp_path)
    (row,) = run_benchmark(asked(export=["onnx"]), where)["files"]
    assert seen == [("onnx", 2, 1.0, (64, 1, 8, 8))]
    assert (row["accuracy"], row["agreement"], row["images"], row["sha256"]) == (None, None, 0, None)
    assert row["device"] == {"kind": "cpu", "name": "fast"} and row["latency"][0]["p50_ms"] == 1.0
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["report.json"]


def test_run_benchmark_stops_between_two_runs(tmp_path):
    where, _ = workspace(tmp_path)
    where.lines.working = lambda done, total: setattr(where, "stop_requested", True)
    with pytest.raises(SystemExit) as ended:
        run_benchmark(asked(), where)
    assert ended.value.code == EXIT_STOPPED and not (tmp_path / "report.json").exists()


def test_latency_of_takes_percentiles_of_runs_after_those_that_warm_up(monkeypatch):
    """Runs take 0, 1, 2, … ms: five to warm up, then the 200 of 5 to 204 ms."""
    monkeypatch.setattr(child, "LATENCY_S", 1e9)
    times = iter(range(1000))

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls) -> float:
            return cls.now

    def run(_: object) -> None:
        Clock.now += next(times) / 1000

    monkeypatch.setattr(child, "time", Clock)
    found = latency_of(run, torch.zeros(3, 1), CPU)
    assert found == {"batch": 3, "p50_ms": pytest.approx(105, abs=1), "p95_ms": pytest.approx(194, abs=1)}
    assert next(times) == 205


def test_benchmark_key_changes_with_all_that_decides_and_with_nothing_else():
    body = {**asked().as_json()}
    key = benchmark_key(body, {"torch": "2.12"})
    assert benchmark_key({**body, "name": "other", "job": "job_1", "export": ["safetensors"]}, {"torch": "2.12"}) == key
    changed = (
        {"architecture": "convnet8"}, {"weights": "blob:sha256:0"}, {"num_classes": 4}, {"channels": 3},
        {"image_size": [9, 8]}, {"batch_size": 4}, {"device": "cpu"}, {"threads": 2}, {"export": ["onnx"]},
    )  # fmt: skip
    keys = {benchmark_key({**body, **change}, {"torch": "2.12"}) for change in changed}
    assert len({*keys, key, benchmark_key(body, {"torch": "2.13"})}) == len(changed) + 2


def test_files_row_has_the_measured_files_of_a_job_or_of_an_export():
    row = {"format": "onnx", "latency": [{"batch": 1, "p50_ms": 2.0, "p95_ms": 3.0}], "cpu": "fast", "accuracy": 0.5}
    student = {"architecture": "convnet4", "parameters": 967, "accuracy": 0.6}
    dataset = {"num_classes": 3, "channels": 1, "image_size": [8, 8], "train": 10}
    spec = {"dataset": {"source": "digits"}, "student": {}}
    report = {"student": student, "dataset": dataset, "files": [row, {"format": "onnx_int8", "latency": []}]}
    figures = files_row("job_2", spec, report)
    assert figures is not None and figures["files"] == [row]
    assert figures["device"] == {"kind": "cpu", "name": "fast"}
    assert (figures["architecture"], figures["accuracy"], figures["dataset"]) == ("convnet4", 0.6, "digits")
    export = {"kind": "export", "distillation": spec}
    assert files_row("job_2", export, {"measured": student, "dataset": dataset, "files": [row]}) == figures
    assert files_row("job_3", spec, {"student": student, "dataset": dataset}) is None
    assert files_row("job_4", {"kind": "benchmark"}, {"files": [row]}) is None
