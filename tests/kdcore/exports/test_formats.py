"""The files of the formats with operations: what they compute at any batch size, what they say, and that the same
student is the same bytes."""

import io
import json
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcore import exports
from kdcore.exports import EXPORTERS, CannotExport, onnx_int8
from kdcore.exports import onnx as onnx_file
from kdcore.programs import open_program
from kdcore.spec import ExportOptions
from tests.kdcore.exports.making import answered, images, needs_onnx, student, write

INSIDE = ExportOptions(normalization="inside", calibration_images=16)
OUTSIDE = ExportOptions(calibration_images=16)
pytestmark = needs_onnx


def run(path, given):
    import onnxruntime

    return torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"images": given.numpy()})[0])


def normalized(one, pixels):
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (one.mean, one.std))
    return (pixels.float() / 255 - mean) / std


def facts_of(path):
    import onnx

    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["distillery"])


@pytest.fixture(scope="module")
def plain():
    return student("convnet4")


@pytest.fixture(scope="module")
def onnx_path(plain, tmp_path_factory):
    return write(EXPORTERS["onnx"], plain, tmp_path_factory.mktemp("onnx") / "student.onnx", OUTSIDE).path


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24])
def test_onnx_computes_the_student_at_any_batch_size(plain, onnx_path, count):
    pixels = images(count)
    torch.testing.assert_close(run(onnx_path, normalized(plain, pixels)), answered(plain, pixels), rtol=1e-4, atol=1e-4)


def test_onnx_with_its_normalisation_inside_takes_pixels_in_0_to_1(plain, tmp_path):
    path = write(EXPORTERS["onnx"], plain, tmp_path / "student.onnx", INSIDE).path
    pixels = images(5)
    torch.testing.assert_close(run(path, pixels.float() / 255), answered(plain, pixels), rtol=1e-4, atol=1e-4)
    assert facts_of(path)["normalization"] == "inside"


def test_onnx_is_a_sound_file_of_opset_20_with_its_batch_norms_folded(onnx_path):
    import onnx

    model = onnx.load(onnx_path)
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 20)]
    assert {node.op_type for node in model.graph.node}.isdisjoint({"BatchNormalization"})
    batch, *image = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [one.dim_value for one in image] == [1, 16, 16]
    assert [one.name for one in (*model.graph.input, *model.graph.output)] == ["images", "logits"]


def test_onnx_says_all_that_its_use_needs(plain, onnx_path):
    said = facts_of(onnx_path)
    assert said["class_names"] == ["class 0", "class 1", "class 2"] and said["architecture"] == "convnet4"
    assert (said["mean"], said["std"], said["image_size"], said["channels"]) == ([0.4], [0.3], [16, 16], 1)
    assert said["metrics"] == {"accuracy": 0.5} and said["normalization"] == "outside"


def test_the_same_student_is_the_same_file_and_names_no_place_of_this_machine(tmp_path):
    names, twice = ("onnx", "onnx_int8", "torch_export"), (student("convnet4"), student("convnet4"))
    for name in names:
        one, other = (
            write(EXPORTERS[name], which, tmp_path / f"{number}", OUTSIDE) for number, which in enumerate(twice)
        )
        assert one.sha256 == other.sha256, name
        content = one.path.read_bytes()
        assert str(Path(exports.__file__).parents[1]).encode() not in content and b"site-packages" not in content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"], "scratch files are gone"


def test_int8_holds_the_weights_in_a_byte_each_and_the_logits_as_float(plain, tmp_path):
    import onnx

    path = write(EXPORTERS["onnx_int8"], plain, tmp_path / "student.int8.onnx", OUTSIDE).path
    model = onnx.load(path)
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    convolutions = [name for name in kinds if name.endswith(".weight_quantized")]
    assert len(convolutions) == 4 and {kinds[name] for name in convolutions} == {onnx.TensorProto.INT8}
    scales = {one.name: list(one.dims) for one in model.graph.initializer if one.name.endswith(".weight_scale")}
    assert sorted(scales.values()) == [[3], [4], [8], [8]], "one for each output channel"
    last = next(node for node in model.graph.node if "logits" in node.output)
    assert last.op_type == "Gemm"
    assert facts_of(path)["class_names"] == list(plain.class_names)
    logits = run(path, normalized(plain, images()))
    assert (logits.argmax(1) == answered(plain, images()).argmax(1)).double().mean() > 0.7


def test_int8_ranges_are_those_of_evenly_spaced_training_images(plain):
    pixels = images(24)
    split = type("Split", (), {"pixels": pixels, "at": lambda self, _side: self, "__len__": lambda _self: 24})()
    reader = onnx_int8._CalibrationImages(plain, replace_options(calibration_images=16), split)
    [batch] = list(iter(reader.get_next, None))
    rows = torch.linspace(0, 23, 16).round().long()
    np.testing.assert_array_equal(batch["images"], normalized(plain, pixels[rows]).numpy())
    assert rows[0] == 0 and rows[-1] == 23 and len(rows.unique()) == 16


def replace_options(**changes):
    return OUTSIDE.model_copy(update=changes)


def test_int8_learned_ranges_replace_those_of_calibration(plain, tmp_path):
    """The first convolution's input: u8 from -1 to 3 has the scale 4 / 255 and its zero at 64."""
    import onnx

    ranges = [{"low": -1.0, "high": 3.0, "read_by": [["conv", 0, 0]]}]
    ranges += [{"low": 0.0, "high": 2.0, "read_by": [["conv", number, 0]]} for number in (1, 2)]
    aware = replace(plain, activation_ranges=ranges, made={})
    model = onnx.load(write(EXPORTERS["onnx_int8"], aware, tmp_path / "student.int8.onnx", OUTSIDE).path)
    values = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    assert values["images_scale"] == pytest.approx(4 / 255) and values["images_zero_point"] == 64
    [read] = [node.input[0] for node in model.graph.node if node.op_type == "Conv" and "layer2" in node.input[1]]
    scale = next(node.input[1] for node in model.graph.node if read in node.output)
    assert values[scale] == pytest.approx(2 / 255)


def test_an_ensemble_is_one_graph_whose_probabilities_stay_float_in_int8(tmp_path):
    import onnx

    one, pixels = student("convnet4", members=2), images()
    path = write(EXPORTERS["onnx"], one, tmp_path / "student.onnx", OUTSIDE).path
    torch.testing.assert_close(run(path, normalized(one, pixels)), answered(one, pixels), rtol=1e-4, atol=1e-4)
    assert facts_of(path)["members"] == 2
    path = write(EXPORTERS["onnx_int8"], one, tmp_path / "student.int8.onnx", OUTSIDE).path
    model = onnx.load(path)
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("LogSoftmax", "Concat", "ReduceLogSumExp"):
            assert all(makers[name].op_type != "DequantizeLinear" for name in node.input if name in makers)
    logits = run(path, normalized(one, pixels))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(24))
    assert (logits.argmax(1) == answered(one, pixels).argmax(1)).double().mean() > 0.7


@pytest.mark.parametrize("options", [OUTSIDE, INSIDE])
def test_torch_export_computes_the_student_at_any_batch_size(plain, tmp_path, options):
    path = write(EXPORTERS["torch_export"], plain, tmp_path / "student.pt2", options).path
    notes = {"distillery.json": ""}
    program = torch.export.load(path, extra_files=notes).module()
    assert json.loads(notes["distillery.json"])["normalization"] == options.normalization
    for count in (1, 2, 7):
        pixels = images(count)
        given = pixels.float() / 255 if options is INSIDE else normalized(plain, pixels)
        torch.testing.assert_close(program(given), answered(plain, pixels))


@pytest.mark.parametrize("name", ["onnx", "torch_export"])
def test_a_file_is_a_teacher_for_others_as_it_stands(plain, tmp_path, name):
    program = open_program(write(EXPORTERS[name], plain, tmp_path / EXPORTERS[name].file, OUTSIDE).path)
    assert (program.facts.num_classes, program.facts.channels) == (3, 1)
    pixels = images(4)
    torch.testing.assert_close(program(normalized(plain, pixels)), answered(plain, pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(find_spec("openvino") is None, reason="the extra distillery[openvino] is absent")
def test_openvino_is_the_same_zip_of_a_graph_that_openvino_runs(tmp_path):
    written = [
        write(EXPORTERS["openvino"], student("convnet4"), tmp_path / f"{number}", OUTSIDE) for number in range(2)
    ]
    assert written[0].sha256 == written[1].sha256
    one, pixels = student("convnet4"), images(5)
    archive = zipfile.ZipFile(io.BytesIO(written[0].path.read_bytes()))
    assert archive.namelist() == ["student.xml", "student.bin"]
    archive.extractall(tmp_path / "unpacked")
    import openvino

    model = openvino.Core().read_model(tmp_path / "unpacked" / "student.xml")
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = torch.from_numpy(compiled(normalized(one, pixels).numpy())[0].copy())
    torch.testing.assert_close(logits, answered(one, pixels), rtol=1e-4, atol=1e-4)
    assert json.loads(model.get_rt_info(["distillery"]).astype(str))["class_names"] == list(one.class_names)


class Branches(torch.nn.Module):
    """Python decides by a value of the images, which no graph can."""

    def forward(self, given):
        return given.flatten(1)[:, :3] if given.sum() > 0 else given.flatten(1)[:, 3:6]


def test_what_cannot_be_a_graph_is_refused_by_its_first_line(plain, tmp_path):
    one = replace(plain, made={})
    vars(one)["network"] = Branches()
    with pytest.raises(CannotExport) as caught:
        write(EXPORTERS["torch_export"], one, tmp_path / "student.pt2", OUTSIDE)
    assert "\n" not in str(caught.value) and 10 < len(str(caught.value)) <= 300
    with pytest.raises(CannotExport):
        onnx_file.graph(one, OUTSIDE)
    assert not list(tmp_path.iterdir())
