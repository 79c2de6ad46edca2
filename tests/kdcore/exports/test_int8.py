"""The table of what int8 costs: of rows that are given, and of a job that trains for int8."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kdcore import quantization
from kdcore.classifier import Classifier
from kdcore.exports import FileRow, int8_table
from kdcore.measure.grading import Outcome
from kdcore.models import build
from kdcore.prepare import prepare
from kdcore.run import run
from tests.kdcore.engine import distilled, int8_session, job, supervised, workspace, write_arrays, write_teacher

FILES = [
    FileRow("student.safetensors", "safetensors", "torch", accuracy=0.8, bytes=400, images=30),
    FileRow("student.onnx", "onnx", "onnxruntime", accuracy=0.8, bytes=410, images=30),
    FileRow(
        "student.int8.onnx",
        "onnx_int8",
        "onnxruntime",
        accuracy=0.75,
        bytes=110,
        images=30,
        quantization="after_training",
    ),
]


def shown(table: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    assert table is not None
    names = ("student", "format", "quantization", "accuracy", "lost")
    return [tuple(row[name] for name in names) for row in table["rows"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_arrays(tmp_path_factory.mktemp("data") / "data.npz")


def outcome(**changes: Any) -> dict[str, dict[str, Outcome]]:
    weights = build("convnet4", 3, 1).state_dict()
    return {"student": {"student": replace(Outcome(weights, weights, 2, 0.5, 2), **changes)}}


def test_int8_table_has_float_beside_int8(data, tmp_path):
    where, _ = workspace(tmp_path)
    spec = job(data, export=["onnx", "onnx_int8"])
    prepared = prepare(spec, where)
    table = int8_table(prepared, where, outcome(), FILES)
    assert table is not None and table["aware_epochs"] == 0
    assert shown(table) == [
        ("delivered", "onnx", None, 0.8, None),
        ("delivered", "onnx_int8", "after_training", 0.75, pytest.approx(0.05)),
    ]
    prepared.spec = job(data, export=["onnx_int8"])
    assert [row[1] for row in shown(int8_table(prepared, where, outcome(), FILES))] == ["safetensors", "onnx_int8"]
    prepared.spec = job(data, export=["onnx"])
    assert int8_table(prepared, where, outcome(), FILES) is None


def test_int8_table_has_no_loss_by_sums_that_overflow_on_this_cpu(data, tmp_path):
    where, _ = workspace(tmp_path)
    prepared = prepare(job(data, export=["onnx", "onnx_int8"]), where)
    overflowing = [*FILES[:2], replace(FILES[2], accuracy=0.4, accuracy_without_overflow=0.75)]
    table = int8_table(prepared, where, outcome(), overflowing)
    assert table is not None and table["rows"][1]["accuracy_without_overflow"] == 0.75
    assert shown(table)[1] == ("delivered", "onnx_int8", "after_training", 0.4, pytest.approx(0.05))


def test_int8_table_without_measured_files_says_nothing_of_a_loss(data, tmp_path):
    where, _ = workspace(tmp_path)
    prepared = prepare(job(data, export=["onnx", "onnx_int8"]), where)
    refused = [*FILES[:2], FILES[2].but_refused("export_unavailable", "not installed", "install it")]
    assert shown(int8_table(prepared, where, outcome(), [replace(one, accuracy=None) for one in refused])) == [
        ("delivered", "onnx", None, None, None),
        ("delivered", "onnx_int8", "after_training", None, None),
    ]


def test_int8_table_measures_the_weights_before_the_epochs_for_int8_and_delivers_none(data, tmp_path, monkeypatch):
    made: list[tuple[str, bool, bool]] = []

    def make(exporter: Any, student: Any, options: Any, data: Any, here: Any) -> FileRow:
        made.append((exporter.format, student.weights is before, (here.out / "student.py").exists()))
        after = "after_training" if exporter.format == "onnx_int8" else None
        return FileRow(
            exporter.file, exporter.format, exporter.runtime, accuracy=0.7 if after else 0.78, quantization=after
        )

    monkeypatch.setattr("kdcore.exports.int8.make", make)
    where, lines = workspace(tmp_path)
    prepared = prepare(job(data, export=["onnx", "onnx_int8"], quantization={"epochs": 1}), where)
    before = dict.fromkeys(build("convnet4", 3, 1).state_dict(), torch.zeros(1))
    delivered = [*FILES[:2], replace(FILES[2], quantization="aware", accuracy=0.79)]
    table = int8_table(prepared, where, outcome(before=before), delivered)
    assert table is not None and table["aware_epochs"] == 1
    assert shown(table) == [
        ("before", "onnx", None, 0.78, None),
        ("before", "onnx_int8", "after_training", 0.7, pytest.approx(0.08)),
        ("delivered", "onnx", None, 0.8, None),
        ("delivered", "onnx_int8", "aware", 0.79, pytest.approx(0.01)),
    ]
    assert made == [("onnx", True, True), ("onnx_int8", True, True)]
    assert not list(tmp_path.glob("student*")) and '"artifact"' not in lines.getvalue()


def test_a_job_without_training_for_int8_names_no_ranges(data, tmp_path):
    where, _ = workspace(tmp_path)
    report = run(supervised(data), where)
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        assert "activation_ranges" not in json.loads(file.metadata()["distillery"])
    assert report["quantization"] is None


@pytest.mark.slow
def test_a_job_that_trains_for_int8_delivers_the_int8_that_it_has_trained(data, tmp_path):
    """The file's answers are those of the rounding network in PyTorch, with the ranges in the weights' own file."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    where, _ = workspace(tmp_path)
    spec = distilled(data, write_teacher(tmp_path / "teacher.safetensors"), epochs=3)
    changes = {"quantization": {"epochs": 1}, "export": ["onnx_int8"], "export_options": {"measure": False}}
    report = run(type(spec).model_validate({**spec.as_json(), **changes}), where)
    assert report["student"]["best"]["epoch"] == 3 and report["alone"]["best"]["epoch"] == 3
    rows = report["quantization"]["rows"]
    assert [(row["student"], row["quantization"]) for row in rows] == [
        ("before", None), ("before", "after_training"), ("delivered", None), ("delivered", "aware"),
    ]  # fmt: skip
    ranges = {}
    for name in ("student", "alone"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["distillery"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        ranges[name] = facts["activation_ranges"]
        if name == "student":
            network = build("convnet4", 3, 1)
            network.load_state_dict(weights)
    assert ranges["student"] != ranges["alone"]
    model = Classifier(network.eval(), facts["mean"], facts["std"]).eval()
    pixels = prepare(spec, workspace(tmp_path / "again")[0]).data.test.pixels[:]
    with torch.no_grad():
        exact = model(pixels).logits
        model.rounding = quantization.FakeQuantization(ranges["student"])
        rounded = model(pixels).logits
    session = int8_session(tmp_path / "student.int8.onnx")
    images = (pixels.float() / 255 - model.mean) / model.std
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    apart, of_int8 = torch.from_numpy(logits) - rounded, rounded - exact
    assert float(apart.norm()) < float(of_int8.norm()) / 2
