"""The bench of files that ship: its jobs, its table, and the program that measures files by onnxruntime alone."""

import ast
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.shipping import FORMATS, JOBS, flowers, smoke, table
from kdcore.spec import JobSpec

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
SIZE, CLASSES = 6, ["dark", "light"]


def test_specs_differ_in_the_training_for_int8_alone(tmp_path: Path) -> None:
    for plan in (flowers(10, "job:job_1"), smoke(tmp_path)):
        plain, aware = (plan.spec(name) for name in JOBS)
        for spec in (plain, aware):
            assert list(JobSpec.model_validate(spec).export) == FORMATS
        assert aware.pop("quantization") == {"aware": True} and plain.pop("baseline") == "train"
        assert plain == aware


def _row(name: str, **more: Any) -> dict[str, Any]:
    latency = [{"batch": 1, "p50_ms": 1.0, "p95_ms": 2.0}, {"batch": 4, "p50_ms": 3.0, "p95_ms": 4.0}]
    row = {"name": name, "format": "onnx", "accuracy": 0.9, "agreement": 1.0, "bytes": 4000, "images": 40}
    row |= {"latency": latency, "threads": 1, "cpu": "a CPU", "quantization": None, "refused": None}
    return row | more


def test_table_has_models_files_and_what_was_refused() -> None:
    model = {"architecture": "resnet20", "accuracy": 0.9, "bytes": 1_000_000}
    refused = _row("student.onnx", refused={"code": "export_mismatch", "message": "it is worse"}, latency=[])
    report = {"test_samples": 40, "teacher": model, "alone": None, "student": model}
    reports = {
        "plain": report | {"files": [refused, _row("student.int8.onnx", quantization="after_training")]},
        "aware": report | {"files": [_row("student.int8.onnx", quantization="aware")]},
    }
    lines = table(reports).splitlines()
    assert lines[0] == "40 test images; 1 thread(s) of a CPU. p50 of a batch in ms."
    assert lines[2].endswith("| p50, batch 1 | p50, batch 4 |")
    assert lines[4] == "| resnet20 | teacher | – | 90.00 | – | 1,000,000 | – | – |"
    assert "refused: | it is worse" in lines[6]
    assert lines[7] == "| plain | `student.int8.onnx` | after training | 90.00 | 100.00 | 4,000 | 1.00 | 3.00 |"
    assert "trained for" in lines[9]
    assert {line.count("|") for line in lines[2:]} == {9}


def _pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    return (rng.integers(0, 100, (40, SIZE, SIZE, 3)) + 150 * labels[:, None, None, None]).astype("uint8"), labels


def _write_model(path: Path, threshold: float, archive: str) -> None:
    """Write a network that compares the mean of an image, normalised by (x - 0.5) / 0.25, with a threshold."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    weights = onnx.numpy_helper.from_array(np.array([[-1, 1]] * 3, "float32"), "weights")
    bias = onnx.numpy_helper.from_array(np.array([3 * threshold, -3 * threshold], "float32"), "bias")
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", floats, ["batch", 3, SIZE, SIZE])
    logits = helper.make_tensor_value_info("logits", floats, ["batch", 2])
    graph = helper.make_graph(nodes, "student", [images], [logits], [weights, bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    facts = {"class_names": CLASSES, "image_size": [SIZE, SIZE], "mean": [0.5] * 3, "std": [0.25] * 3}
    facts |= {"normalization": "outside", "spec": {"dataset": {"source": archive}}}
    helper.set_model_props(model, {"distillery": json.dumps(facts)})
    onnx.save(model, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a job: a float file that is always right, and an int8 file that takes the darkest for light."""
    pixels, labels = _pictures()
    means = (pixels.mean((1, 2, 3)) / 255 - 0.5) / 0.25
    below = np.sort(means[labels == 0])[-3:-1].mean()
    _write_model(tmp_path / "student.onnx", (means[labels == 0].max() + means[labels == 1].min()) / 2, "npz")
    _write_model(tmp_path / "student.int8.onnx", float(below), "npz")
    rows = [_row("student.safetensors")]
    for name, right in (("student.onnx", 40), ("student.int8.onnx", 38)):
        content = (tmp_path / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        rows.append(_row(name, accuracy=right / 40, agreement=right / 40, bytes=len(content), sha256=digest))
    (tmp_path / "report.json").write_text(json.dumps({"files": rows}))
    np.savez(tmp_path / "pictures.npz", x_test=pixels, y_test=labels)
    return tmp_path


def _changed(folder: Path, **fields: Any) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["files"][-1] |= fields
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Any:
    from bench import measure_files

    monkeypatch.setattr(measure_files, "LATENCY_S", 0.0)
    return measure_files


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 0),
        ({"accuracy": 37 / 40, "agreement": 1.0}, 1),
        ({"accuracy": 39 / 40, "agreement": 37 / 40}, 0),
        ({"accuracy": 36 / 40}, 1),
        ({"bytes": 1}, 1),
        ({"sha256": "0" * 64}, 1),
        ({"images": 39}, 1),
    ],
)
def test_measured_files_are_within_one_image_and_exact_in_bytes(
    measure: Any, folder: Path, fields: dict[str, Any], expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _changed(folder, **fields)
    assert measure.main(folder, folder / "pictures.npz") == expected
    printed = capsys.readouterr().out
    assert "student.safetensors" not in printed and "of float, 4" in printed
    assert ("OTHER" in printed) == bool(expected)


def test_measured_pictures_are_resized_and_cut_out(measure: Any, folder: Path) -> None:
    from PIL import Image

    archive = folder / "pictures.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for split, number, light in (("train", 0, 1), ("test", 0, 0), ("test", 1, 1)):
            content = io.BytesIO()
            picture = Image.new("RGB", (4 * SIZE, 2 * SIZE), (255 * light,) * 3)
            picture.paste((7, 7, 7), (0, 0, SIZE, 2 * SIZE))  # The quarter that is cut off.
            picture.save(content, "PNG")
            opened.writestr(f"all/{split}/{CLASSES[light]}/{number}.png", content.getvalue())
    _, facts = measure.opened(folder / "student.onnx", 1)
    pixels, labels = measure.test_images(archive, facts)
    assert pixels.shape == (2, 3, SIZE, SIZE) and labels.tolist() == [0, 1]
    assert set(pixels[0].ravel()) <= {0, *range(8)} and pixels[1, :, :, 1:].min() == 255
    facts["spec"]["dataset"]["resize"] = "pad"
    with pytest.raises(SystemExit, match="resizes by crop"):
        measure.test_images(archive, facts)


def test_the_measuring_program_imports_nothing_of_ours(measure: Any) -> None:
    tree = ast.parse(Path(measure.__file__).read_text())
    names = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    names |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"hashlib", "io", "json", "os", "sys", "time", "zipfile", "pathlib", "numpy", "onnxruntime", "PIL"}
