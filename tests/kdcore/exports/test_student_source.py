"""The text of `student.py`: each network computes what ours does, and imports nothing of ours."""

import ast
import importlib.util
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from kdcore.data.image_files import planes
from kdcore.exports import safetensors
from kdcore.exports.student_source import student_source
from kdcore.models import NETWORKS, resnet
from kdcore.spec import parse
from tests.kdcore.exports.making import answered, images, settled, student

LARGE = {
    *("resnet110", "resnet110_option_a", "resnet56", "resnet56_option_a", "resnet44", "resnet44_option_a"),
    *("resnet32x4", "resnet34_cifar", "resnet50_cifar", "vgg13", "vgg16", "vgg19", "wrn_40_1", "wrn_40_2"),
}
"""Made of the same parts as smaller ones. Bottlenecks have a test of their own."""


def imported(text: str, folder: Path) -> ModuleType:
    (folder / "student.py").write_text(text)
    spec = importlib.util.spec_from_file_location("student", folder / "student.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(one, folder: Path) -> ModuleType:
    """The file's network answers as ours does."""
    module = imported(student_source(one), folder)
    safetensors.write(one, folder / "student.safetensors")
    network = module.load(folder / "student.safetensors")
    pixels = images(2, one.channels, one.image_size[0])
    torch.testing.assert_close(network(module.preprocess(pixels)), answered(one, pixels), rtol=1e-5, atol=1e-5)
    assert network.class_names == list(one.class_names) and not network.training
    return module


@pytest.mark.parametrize("architecture", sorted(set(NETWORKS) - LARGE))
def test_student_source_computes_what_our_network_does(architecture, tmp_path):
    check(student(architecture), tmp_path)


@pytest.mark.parametrize("architecture", sorted(LARGE))
def test_student_source_of_a_large_network_has_its_tensors(architecture, tmp_path):
    one = replace(student("convnet4"), architecture=architecture)
    module = imported(student_source(one), tmp_path)
    with torch.device("meta"):
        ours, made = NETWORKS[architecture](3, 1), module.build()
    assert [(name, value.shape) for name, value in made.state_dict().items()] == [
        (name, value.shape) for name, value in ours.state_dict().items()
    ]
    assert [type(part).__name__ for part in made.modules()] == [
        type(part).__name__.replace("InTurn", "Sequential") for part in ours.modules()
    ]


def test_student_source_a_bottleneck_computes_what_ours_does(tmp_path):
    module = imported(student_source(replace(student("convnet4"), architecture="resnet50_cifar")), tmp_path)
    ours = resnet.bottleneck_group(8, 4, 2, 2)
    theirs = module.bottleneck_group(8, 4, 2, 2)
    settled(ours, 8)
    theirs.load_state_dict(ours.state_dict())
    maps = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(theirs.eval()(maps), ours.eval()(maps))


@pytest.mark.parametrize("architecture", ["convnet4+relu8", "convnet4+bn_gelu8+linear4", "resnet8+silu8"])
def test_student_source_has_the_hidden_layers_of_a_classifier(architecture, tmp_path):
    check(student(architecture), tmp_path)


@pytest.mark.parametrize("architecture", ["convnet4", "convnet4+tanh4"])
def test_student_source_of_an_ensemble_answers_the_mean_of_its_probabilities(architecture, tmp_path):
    one = student(architecture, members=2)
    module = check(one, tmp_path)
    pixels = images(2)
    x = module.preprocess(pixels)
    with torch.no_grad():
        mean = torch.stack([member(x).softmax(1) for member in one.network]).mean(0)
    torch.testing.assert_close(answered(one, pixels).softmax(1), mean)


@pytest.mark.parametrize(
    ("architecture", "built"),
    [
        ("torchvision/mobilenet_v2", 'torchvision().models.get_model("mobilenet_v2", weights=None, num_classes=3)'),
        ("torchvision/googlenet", "weights=None, num_classes=3, aux_logits=False, init_weights=True)"),
        ("timm/test_resnet", 'timm.create_model("test_resnet", pretrained=False, num_classes=3, in_chans=1)'),
    ],
)
def test_student_source_of_a_library_says_that_it_needs_it(architecture, built):
    text = student_source(replace(student("convnet4"), architecture=architecture))
    assert built in text and f"Needs PyTorch and {architecture.partition('/')[0]}, which builds it." in text
    assert "kdcore" not in text and compile(text, "student.py", "exec")


@pytest.mark.parametrize(
    "architecture", ["resnet20", "vgg8", "wrn_16_1", "shufflenetv1", "mobilenetv2_x0_5", "convnet4"]
)
def test_student_source_imports_torch_and_the_standard_library_alone(architecture):
    tree = ast.parse(student_source(student(architecture)))
    lines = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {line.split()[1].partition(".")[0] for line in lines}
    assert modules <= {"json", "math", "collections", "pathlib", "typing", "abc", "torch"}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.asname or alias.name for node in imports for alias in node.names} <= used, "no import is in vain"


def test_student_source_is_the_same_text_for_the_same_student():
    assert student_source(student("resnet8")) == student_source(student("resnet8"))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("options", "size", "mode"),
    [
        ({"image_size": 16}, (40, 30), "RGB"),
        ({"image_size": 16, "resize_to": 20}, (16, 16), "RGB"),
        ({"image_size": 16, "resize": "squash", "interpolation": "bicubic"}, (40, 30), "RGB"),
        ({"image_size": 16, "resize": "pad", "interpolation": "nearest"}, (40, 30), "RGB"),
        ({"image_size": 16, "channels": 3}, (23, 16), "L"),
        ({"image_size": 16}, (23, 40), "RGBA"),
        ({"image_size": 16}, (23, 40), "P"),
    ],
)
def test_preprocess_makes_of_a_picture_what_the_training_saw(options, size, mode, tmp_path):
    dataset = {"source": "file:/nowhere.zip", **options}
    spec = parse({"dataset": dataset, "student": "convnet4", "method": "supervised"})
    one = student("convnet4", 3, spec=spec)
    module = imported(student_source(one), tmp_path)
    seen = torch.from_numpy(planes(picture(*size, mode), 3, spec.dataset).copy())
    assert torch.equal(module.preprocess(picture(*size, mode)), module.preprocess(seen))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (one.mean, one.std))
    assert torch.equal(module.preprocess(seen)[0], (seen / 255 - mean) / std)


def test_preprocess_turns_a_picture_upright_if_the_training_did(tmp_path):
    sideways = picture(40, 30)
    exif = sideways.getexif()
    exif[0x0112] = 6
    file = BytesIO()
    sideways.save(file, "PNG", exif=exif)
    for orientation in ("apply", "ignore"):
        dataset = {"source": "file:/nowhere.zip", "image_size": 16, "orientation": orientation}
        spec = parse({"dataset": dataset, "student": "convnet4", "method": "supervised"})
        module = imported(student_source(student("convnet4", 3, spec=spec)), tmp_path)
        seen = torch.from_numpy(planes(Image.open(file), 3, spec.dataset).copy())
        assert torch.equal(module.preprocess(Image.open(file)), module.preprocess(seen))


def test_preprocess_takes_pixels_in_the_usual_orders(tmp_path):
    module = imported(student_source(student("convnet4", 3)), tmp_path)
    pixels = images(2, 3)
    expected = module.preprocess(pixels)
    assert torch.equal(module.preprocess(pixels[0]), expected[:1])
    assert torch.equal(module.preprocess(pixels[0].permute(1, 2, 0).numpy()), expected[:1])
    grey = imported(student_source(student("convnet4")), tmp_path)
    assert torch.equal(grey.preprocess(images(1)[0, 0].numpy()), grey.preprocess(images(1)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(3, 16, 16), r"uint8 pixels N x 3 x 16 x 16 are needed, not torch.float32 1 x 3 x 16 x 16"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"not torch.uint8 1 x 3 x 8 x 8"),
        (Image.new("I;16", (16, 16)), r"more than 8 bits \(I;16\): scale its values to 0..255 first"),
    ],
)
def test_preprocess_refuses_what_it_cannot_take(given, said, tmp_path):
    module = imported(student_source(student("convnet4", 3)), tmp_path)
    with pytest.raises(ValueError, match=said):
        module.preprocess(given)
