"""From a student to files: all formats of one student, made and measured once, and what is refused."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from base.files import sha256_of
from kdcore.checkpoint import Stopped
from kdcore.exports import EXPORTERS, CannotExport, measuring, safetensors, shipping
from kdcore.exports.measuring import FileFailed, Measured
from kdcore.spec import ExportOptions
from tests.kdcore.engine import events, int8_session, workspace
from tests.kdcore.exports.making import answered, data, images, needs_onnx, student

FORMATS = ("safetensors", "onnx", "onnx_int8", "torch_export")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The rows by format, the folder, and the lines."""
    folder = tmp_path_factory.mktemp("shipped")
    where, stream = workspace(folder)
    one = student("convnet4")
    options = ExportOptions(batch_size=8, calibration_images=16, tolerance=0.3)
    rows = shipping.ship(one, FORMATS, options, data(one, images()), where)
    return SimpleNamespace(rows={row.format: row for row in rows}, folder=folder, lines=stream)


@needs_onnx
def test_ship_each_file_is_an_artifact_with_its_own_row(shipped):
    artifacts = {line["name"]: line for line in events(shipped.lines, "artifact")}
    assert set(artifacts) == {row.name for row in shipped.rows.values()} | {"student.py"}
    for row in shipped.rows.values():
        path = shipped.folder / row.name
        assert (row.bytes, row.sha256) == (path.stat().st_size, sha256_of(path)) and row.refused is None
        assert (artifacts[row.name]["bytes"], artifacts[row.name]["sha256"]) == (row.bytes, row.sha256)
    assert not events(shipped.lines, "warning")
    assert {path.name for path in shipped.folder.iterdir()} == set(artifacts), "no scratch file is left"


@needs_onnx
def test_ship_float_files_agree_with_the_student_on_every_image(shipped):
    for name in ("safetensors", "onnx", "torch_export"):
        row = shipped.rows[name]
        assert (row.accuracy, row.agreement, row.images, row.quantization) == (1.0, 1.0, 24, None)


@needs_onnx
def test_ship_int8_is_measured_as_the_others_are(shipped):
    row = shipped.rows["onnx_int8"]
    assert row.accuracy == row.agreement and row.accuracy >= 0.7 and row.quantization == "after_training"


@needs_onnx
def test_ship_int8_in_sums_that_cannot_overflow_is_the_file_by_operators_that_are_not_fused(shipped):
    one, pixels, options = student("convnet4"), images(), ExportOptions(batch_size=8)
    path = shipped.folder / "student.int8.onnx"
    found = measuring.measure("onnxruntime", path, path, one, options, data(one, pixels).test, fused=False)
    normalised = (pixels.float() / 255 - torch.tensor(one.mean)) / torch.tensor(one.std)
    logits = torch.from_numpy(int8_session(path).run(None, {"images": normalised.numpy()})[0])
    assert found.accuracy == float((logits.argmax(1) == answered(one, pixels).argmax(1)).double().mean())
    row = shipped.rows["onnx_int8"]
    assert row.accuracy_without_overflow == (found.accuracy if measuring.int8_overflows() else None)


@needs_onnx
def test_ship_rows_say_by_what_on_what_and_how_fast_a_file_was_run(shipped):
    runtimes = {name: row.runtime.split()[0] for name, row in shipped.rows.items()}
    assert runtimes == {
        "safetensors": "torch", "onnx": "onnxruntime", "onnx_int8": "onnxruntime", "torch_export": "torch.export"
    }  # fmt: skip
    for row in shipped.rows.values():
        assert [one["batch"] for one in row.latency] == [1, 8]
        assert all(0 < one["p50_ms"] <= one["p95_ms"] and 0 < one["cpu_share"] <= 1 for one in row.latency)
        assert row.threads == torch.get_num_threads() and row.cpu == measuring.cpu_name() and row.cpu
        assert row.runtime.split()[1][0].isdigit()
        assert row.peak_memory_bytes > 10 << 20
    onnx, plain = shipped.rows["onnx"], shipped.rows["safetensors"]
    assert onnx.peak_memory_bytes < plain.peak_memory_bytes, "its process has not loaded PyTorch"
    assert json.loads(json.dumps(onnx.as_dict())) == onnx.as_dict()


def answers(**figures):
    """A measurement that found these figures."""
    sound = {"accuracy": 1.0, "agreement": 1.0, "difference": 0.0}
    rest = {"version": "1.0", "images": 24, "latency": [], "threads": 1, "cpu": "x", "peak_memory_bytes": 1}
    return lambda *_args: Measured(**{**sound, **rest, **figures})


def failing(*_args):
    raise FileFailed("the graph has no end")


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (
            answers(accuracy=0.9),
            r"is right on 90.0% of the test images and the student on 100.0%: .*tolerance, 5.0%",
        ),
        (answers(difference=0.5), r"does not compute what the student does: its logits differ by 0.5 of the largest"),
        (answers(difference=float("nan")), r"does not compute what the student does: its logits differ by nan"),
        (failing, r"torch cannot run student.safetensors: the graph has no end"),
    ],
)
def test_ship_a_file_that_is_not_the_student_is_refused(measure, message, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "measure", measure)
    where, stream = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["safetensors"], ExportOptions(tolerance=0.05), data(one, images()), where)
    assert row.refused["code"] == "export_mismatch" and row.bytes > 0
    [warning] = events(stream, "warning")
    assert (warning["code"], warning["pointer"]) == ("export_mismatch", "/export")
    assert warning["message"] == row.refused["message"]
    assert re.search(message, row.refused["message"])
    assert [line["name"] for line in events(stream, "artifact")] == ["student.py"]
    assert not (tmp_path / "student.safetensors").exists()


def test_ship_within_the_tolerance_a_file_is_delivered(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "measure", answers(accuracy=0.95))
    where, stream = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["safetensors"], ExportOptions(tolerance=0.05), data(one, images()), where)
    assert row.refused is None and row.accuracy == 0.95 and not events(stream, "warning")


def answers_of(fused, unfused):
    """Measurements of an int8 file: as users run it, and in sums that cannot overflow."""
    return lambda *_args, **how: answers(accuracy=fused if how.get("fused", True) else unfused)()


@needs_onnx
def test_ship_int8_that_overflows_on_this_cpu_is_delivered_for_others(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "measure", answers_of(0.6, 0.97))
    monkeypatch.setattr(measuring, "int8_overflows", lambda: True)
    where, stream = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["onnx_int8"], ExportOptions(tolerance=0.05), data(one, images()), where)
    assert (row.accuracy, row.accuracy_without_overflow, row.refused) == (0.6, 0.97, None)
    [warning] = events(stream, "warning")
    assert (warning["code"], warning["pointer"]) == ("int8_overflows", "/export")
    assert "is right on 60.0% of the test images on this worker's CPU (x)" in warning["message"]
    assert warning["message"].endswith("it is right on 97.0%")


@needs_onnx
@pytest.mark.parametrize(
    ("overflows", "fused", "unfused", "without_overflow", "warnings"),
    [
        (True, 0.94, 0.97, 0.97, []),
        (True, 0.94, 0.94, 0.94, ["export_mismatch"]),
        (False, 0.97, 0.0, None, []),
        (False, 0.94, 0.97, None, ["export_mismatch"]),
    ],
)
def test_ship_int8_is_judged_by_its_own_rounding(
    overflows, fused, unfused, without_overflow, warnings, tmp_path, monkeypatch
):
    monkeypatch.setattr(measuring, "measure", answers_of(fused, unfused))
    monkeypatch.setattr(measuring, "int8_overflows", lambda: overflows)
    where, stream = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["onnx_int8"], ExportOptions(tolerance=0.05), data(one, images()), where)
    assert (row.accuracy, row.accuracy_without_overflow) == (fused, without_overflow)
    assert [line["code"] for line in events(stream, "warning")] == warnings


def test_ship_a_broken_exporter_is_found_by_its_file(tmp_path, monkeypatch):
    """The whole way: the file is written, loaded by its runtime in a process, and its outputs compared."""

    def write(_exporter, one, path, *_rest):
        weights = {**one.weights, "fc.weight": -one.weights["fc.weight"]}
        safetensors.write(replace(one, weights=weights), path)

    monkeypatch.setattr(safetensors.Safetensors, "write", write)
    where, stream = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["safetensors"], ExportOptions(batch_size=8), data(one, images()), where)
    assert row.refused["code"] == "export_mismatch" and "its logits differ by" in row.refused["message"]
    assert row.accuracy < 1 and [line["code"] for line in events(stream, "warning")] == ["export_mismatch"]


def test_ship_what_has_no_form_in_a_format_is_a_warning(tmp_path, monkeypatch):
    def write(*_args):
        raise CannotExport("aten::sort is unknown")

    monkeypatch.setattr(type(EXPORTERS["torch_export"]), "write", write)
    where, stream = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["torch_export"], ExportOptions(), data(one, images()), where)
    assert (row.bytes, row.sha256, row.accuracy) == (None, None, None)
    assert row.refused == {
        "code": "export_unavailable", "message": "student.pt2 cannot be made of convnet4: aten::sort is unknown",
        "hint": "take another format",
    }  # fmt: skip
    assert [line["code"] for line in events(stream, "warning")] == ["export_unavailable"]


def test_ship_a_missing_library_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.spec.shipping.find_spec", lambda name: None if name == "openvino" else name)
    where, stream = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["openvino"], ExportOptions(), data(one, images()), where)
    assert row.refused["message"] == "student.openvino.zip cannot be made: openvino is not installed on this worker"
    assert [line["code"] for line in events(stream, "warning")] == ["export_unavailable"]


def test_ship_without_measuring_writes_the_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "measure", failing)
    where, _ = workspace(tmp_path)
    one = student("convnet4")
    [row] = shipping.ship(one, ["safetensors"], ExportOptions(measure=False), data(one, images()), where)
    assert (row.accuracy, row.images, row.latency, row.refused) == (None, 0, (), None) and row.bytes > 0


def test_ship_stops_between_two_files(tmp_path):
    where, _ = workspace(tmp_path)
    where.stop_requested = True
    one = student("convnet4")
    with pytest.raises(Stopped):
        shipping.ship(one, ["safetensors"], ExportOptions(measure=False), data(one, images()), where)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["student.py"]


def installed(names, folder):
    """A folder for an import path that has these packages and what they need, and no other."""
    to_come, done = list(names), set()
    while to_come:
        name = to_come.pop()
        if name in done:
            continue
        done.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # Of another platform.
            continue
        for top in {Path(file).parts[0] for file in package.files} - {"..", "__pycache__"}:
            (folder / top).symlink_to(package.locate_file(top))
        to_come += [re.match(r"[\w.-]+", need)[0] for need in package.requires or () if "extra ==" not in need]
    return folder


FIVE_LINES = """
import torch, student
from PIL import Image
net = student.load("student.safetensors")
x = student.preprocess(Image.open("picture.png"))
print(net.class_names[net(x).argmax()])
"""
THREE_LINES = """
import json, numpy, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession("student.onnx")
facts = json.loads(session.get_modelmeta().custom_metadata_map["distillery"])
x = (numpy.asarray(Image.open("picture.png"), "float32")[None, None] / 255 - facts["mean"]) / facts["std"]
[logits] = session.run(None, {"images": x.astype("float32")})
print(facts["class_names"][logits.argmax()])
"""
WITHOUT = """
import importlib.util
absent = ("kdcore", "base", "safetensors", "onnx", "onnxscript", "pydantic")
assert not any(importlib.util.find_spec(name) for name in absent)
"""


@needs_onnx
@pytest.mark.parametrize("lines", [FIVE_LINES, THREE_LINES])
def test_student_runs_in_a_few_lines_where_nothing_of_the_project_is_installed(shipped, tmp_path, lines):
    """Done when 4 of issue 16: from a folder outside the project, with these packages and those that they need."""
    one, pixels = student("convnet4"), images()
    needed = ["torch", "pillow", "numpy"] if lines is FIVE_LINES else ["onnxruntime", "pillow", "numpy"]
    site = installed(needed, Path(tempfile.mkdtemp(dir=tmp_path)))
    for name in ("student.py", "student.safetensors", "student.onnx"):
        (tmp_path / name).write_bytes((shipped.folder / name).read_bytes())
    Image.fromarray(pixels[0, 0].numpy()).save(tmp_path / "picture.png")
    environment = {**os.environ, "PYTHONPATH": f"{site}:{tmp_path}", "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-S", "-s", "-P", "-c", WITHOUT + lines]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, f"class {int(answered(one, pixels[:1]).argmax())}"), ran.stderr
