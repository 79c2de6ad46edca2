"""ONNX files as networks: the same logits as PyTorch's, for every batch, and every other file is refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from base.errors import OutOfMemory, TeacherMismatch
from kdcore import models, programs, weights
from kdcore.catalog.facts import ProgramFacts
from kdcore.checkpoint import Stopped
from kdcore.classifier import Classifier, FrozenTeacher
from kdcore.measure import evaluate
from kdcore.programs.onnx_program import INSTALL, PIECE
from kdcore.run import run
from kdcore.spec import Dataset
from kdcore.training import StageTraining
from tests.kdcore.engine import events, job, same, workspace, write_arrays
from tests.kdcore.programs.onnx_making import (
    ANY_BATCH,
    ANY_SIZE,
    MEAN_COLOUR,
    exported,
    model,
    needs_onnx,
    node,
    plain,
    saved,
    tensor,
)

pytestmark = needs_onnx
SHARED = Path(__file__).parents[4] / "shared" / "data" / "teachers"
CLOSE = 1e-5
"""Of logits of size 1: two libraries add up in other orders."""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Three channels of 16 x 16 to 7 classes, with batch norms whose statistics are not those of a new network."""
    torch.manual_seed(0)
    made = models.build("resnet8", 7)
    with torch.no_grad():
        made(torch.randn(32, 3, 16, 16))
    return made.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(PIECE["cpu"] + 5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def file(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(network, tmp_path_factory.mktemp("onnx") / "t.onnx", torch.zeros(2, 3, 16, 16), ANY_BATCH)


def logits(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images)


def test_onnx_program_has_the_logits_of_the_network(file: Path, network: nn.Module, images: Tensor):
    program = programs.open_program(file)
    assert torch.allclose(program(images), logits(network, images), rtol=0, atol=CLOSE)
    assert program(images[:0]).shape == (0, 7)
    assert not program(images[:2].clone().requires_grad_()).requires_grad


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real teachers are not at hand")
def test_onnx_program_has_the_logits_of_a_trained_network(tmp_path: Path):
    network = models.build("resnet20", 100)
    state = weights.open_teacher(SHARED / "cifar100_resnet20.pth", "resnet20").state
    weights.load_into(network.eval(), state, "the checkpoint")
    program = programs.open_program(exported(network, tmp_path / "t.onnx", torch.zeros(2, 3, 32, 32), ANY_BATCH))
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    want = logits(network, images)
    # Of logits up to 15, with sums of thousands of products: 1.3e-5 was measured with the ResNet-56.
    assert want.abs().max() > 5 and torch.allclose(program(images), want, rtol=0, atol=1e-4)


def test_onnx_program_row_has_the_same_bits_whatever_is_around_it(file: Path, images: Tensor):
    program = programs.open_program(file)
    together, order = program(images), torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    assert torch.equal(program(images[order]), together[order])
    assert all(torch.equal(program(images[row : row + 1])[0], together[row]) for row in (0, 3, len(images) - 1))
    assert torch.equal(programs.open_program(file)(images), together)


@pytest.mark.parametrize("batch", [1, 4])
def test_onnx_program_of_a_fixed_batch_runs_in_pieces(tmp_path: Path, batch: int, network: nn.Module, images: Tensor):
    path = exported(network, tmp_path / "t.onnx", torch.zeros(batch, 3, 16, 16))
    program = programs.open_program(path)
    assert program.facts.batch == batch
    for count in (7, 1):
        assert torch.allclose(program(images[:count]), logits(network, images[:count]), rtol=0, atol=CLOSE)


def test_onnx_program_for_any_size(tmp_path: Path, network: nn.Module):
    path = exported(network, tmp_path / "t.onnx", torch.zeros(2, 3, 16, 16), ANY_SIZE)
    program = programs.open_program(path)
    assert program.facts.image_size == (None, None)
    images = torch.randn(2, 3, 24, 20)
    assert torch.allclose(program(images), logits(network, images), rtol=0, atol=CLOSE)


def test_onnx_program_in_half_precision(tmp_path: Path):
    """Weights and images in float16: rounded by 2^-11, and the sum of 64 pixels with them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    images = torch.randn(5, 3, 8, 8)
    want = logits(network, images)
    path = exported(network.half(), tmp_path / "t.onnx", torch.zeros(2, 3, 8, 8).half(), ANY_BATCH)
    got = programs.open_program(path)(images)
    assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=0, atol=5e-3)


def test_onnx_program_with_channels_last(tmp_path: Path):
    """As TensorFlow's networks are. The logits by hand: the mean colour times the weights."""
    turned = node("Transpose", "x", "turned", perm=[0, 3, 1, 2])
    pooled = ("GlobalAveragePool", "turned", "pooled")
    content = model(turned, pooled, *MEAN_COLOUR[1:], ("Identity", "logits", "y"), images=("N", 8, 10, 3))
    program = programs.open_program(saved(tmp_path / "t.onnx", content))
    assert (program.facts.channels, program.facts.image_size) == (3, (8, 10))
    images = torch.randn(3, 3, 8, 10)
    by_hand = images.mean((2, 3)) @ torch.arange(12).reshape(3, 4).div(10)
    assert torch.allclose(program(images), by_hand, atol=1e-6)


def test_inspect_facts_of_an_onnx_file(file: Path, network: nn.Module):
    facts = programs.inspect(file)
    assert facts == ProgramFacts(
        format="onnx", num_classes=7, channels=3, parameters=facts.parameters, bytes=file.stat().st_size,
        digest=facts.digest, image_size=(16, 16),
    )  # fmt: skip
    # Batch norms are folded into convolutions by the export: two numbers of a channel become one.
    assert 0.98 < facts.parameters / sum(parameter.numel() for parameter in network.parameters()) <= 1
    program = programs.open_program(file)
    both = nn.ModuleList([program, nn.Linear(2, 1)])
    assert evaluate.parameters(both) == facts.parameters + 3
    assert evaluate.size_bytes(both) == facts.bytes + 12


def test_onnx_program_probabilities_become_logits(tmp_path: Path):
    """softmax(log p / T) = softmax(z / T), for every T."""
    of_logits = programs.open_program(saved(tmp_path / "z.onnx", plain()))
    of_softmax = programs.open_program(saved(tmp_path / "p.onnx", plain(node("Softmax", "logits", "y", axis=1))))
    assert (of_logits.facts.outputs, of_softmax.facts.outputs) == ("logits", "probabilities")
    images = torch.randn(4, 3, 8, 8)
    for temperature in (1.0, 4.0):
        one, other = ((program(images) / temperature).softmax(1) for program in (of_logits, of_softmax))
        assert torch.allclose(one, other, atol=1e-6)
    certain = plain(("Mul", "logits k", "sharp"), node("Softmax", "sharp", "y", axis=1), constants=[tensor("k", 1e6)])
    program = programs.open_program(saved(tmp_path / "c.onnx", certain))
    assert program(images).isfinite().all() and program(images).min() == pytest.approx(-87.34, abs=0.01)


MEAN_OF_FLOATS = (("GlobalAveragePool", "floats", "pooled"), ("Flatten", "pooled", "flat"), ("MatMul", "flat w", "y"))
REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("huge images", lambda: plain(images=("N", 3, 10**6, 10**6)), "N x 3 x 1000000 x 1000000; an image has at most"),
    ("a huge batch", lambda: plain(images=(10**7, 3, 8, 8)), "a fixed batch 268,435,456"),
    ("no images", lambda: plain(images=("N", 3, 0, 8)), "0 x 8: no images"),
    ("bytes", lambda: model(node("Cast", "x", "floats", to=1), *MEAN_OF_FLOATS, kind=2), "takes uint8 N x 3 x 8 x 8"),
    ("rows", lambda: model(("MatMul", "x w", "y"), images=("N", 3)), "takes float N x 3, not images"),
    ("any channels", lambda: plain(images=("N", "C", 8, 8)), "number of channels must be known"),
    ("maps", lambda: model(("GlobalAveragePool", "x", "y"), logits=("N", 3, 1, 1)), "returns float N x 3 x 1 x 1"),
    ("any classes", lambda: model(("Flatten", "x", "y"), images=("N", 3, "H", 8), logits=("N", "K")), "N x K, not a"),
    ("newer operators", lambda: plain(opset=99), "[Oo]pset 99"),
    ("a missing input", lambda: model(("MatMul", "nothing w", "y")), "cannot read the ONNX file: Node input 'nothing'"),
    ("NaN", lambda: plain(("Exp", "logits", "e"), ("Neg", "e", "minus"), ("Sqrt", "minus", "y")), "no numbers"),
    ("infinite", lambda: plain(("Div", "logits zero", "y"), constants=[tensor("zero", 0.0)]), "no numbers"),
    ("the batch's mean", lambda: plain(node("ReduceMean", "logits", "m", axes=[0]), ("Sub", "logits m", "y")), "batch"),
    (
        "the place in the batch",
        lambda: plain(
            ("Add", "logits k", "y"), constants=[tensor("k", *range(8), shape=(2, 4))], images=(2, 3, 8, 8),
            logits=(2, 4),
        ),
        "batch around it",
    ),
    ("dropout", lambda: plain(("Dropout", "logits r t", "y"), constants=[tensor("r", 0.5, shape=()), on()]), "batch"),
]  # fmt: skip


def on() -> Any:
    """The constant t, which is true."""
    from onnx import TensorProto, helper

    return helper.make_tensor("t", TensorProto.BOOL, [], [True])


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_onnx_program_that_is_no_classifier_of_images_is_refused(tmp_path: Path, make: Callable[[], Any], words: str):
    path = saved(tmp_path / "t.onnx", make())
    with pytest.raises(TeacherMismatch, match=words) as caught:
        programs.inspect(path)
    assert str(tmp_path) not in caught.value.message


def test_onnx_program_of_several_inputs_or_outputs_is_refused(tmp_path: Path):
    from onnx import helper

    for field, words in (("input", r"takes 2 \(x, more\)"), ("output", r"returns 2 \(y, logits\)")):
        content = plain()
        name = "more" if field == "input" else "logits"
        getattr(content.graph, field).append(helper.make_tensor_value_info(name, 1, ["N", 4]))
        with pytest.raises(TeacherMismatch, match=words):
            programs.inspect(saved(tmp_path / "t.onnx", content))


def test_onnx_program_that_asks_for_too_much_memory_is_out_of_memory(tmp_path: Path):
    filled = [("ConstantOfShape", "s", "c"), ("ReduceSum", "c", "sum"), ("Add", "logits sum", "y")]
    content = plain(*filled, constants=[tensor("s", 10**13, whole=True)])
    with pytest.raises(OutOfMemory, match="memory that the ONNX file asks for"):
        programs.inspect(saved(tmp_path / "t.onnx", content))


def test_onnx_program_without_the_extra_is_refused_with_the_command_and_not_for_good(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(TeacherMismatch, match="onnxruntime, which reads it, is not installed here") as caught:
        programs.inspect(file)
    assert caught.value.hint == INSTALL and caught.value.retryable


def test_onnx_program_is_a_teacher_of_pixels(file: Path, network: nn.Module):
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    order = [6, 5, 4, 3, 2, 1, 0]
    want = logits(Classifier(network, [0.3] * 3, [0.4] * 3), pixels).logits
    teacher = FrozenTeacher(Classifier(programs.open_program(file), [0.3] * 3, [0.4] * 3, bf16=True, order=order))
    assert torch.allclose(teacher.classifier(pixels).logits, want[:, order], rtol=0, atol=CLOSE)


def test_run_a_job_with_an_onnx_teacher_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = write_arrays(tmp_path / "blobs.npz")
    torch.manual_seed(0)
    network = nn.Sequential(models.build("convnet4", 3, 1), nn.Softmax(1))
    teacher = exported(network, tmp_path / "t.onnx", torch.zeros(2, 1, 8, 8), ANY_BATCH)
    spec = job(data, [{"program": f"file:{teacher}"}], method="kd")
    where, stream = workspace(tmp_path / "whole")
    report = run(spec, where)
    assert [line["code"] for line in events(stream, "warning")][:1] == ["outputs_are_probabilities"]
    row = report["teacher"]
    assert (row["architecture"], row["bytes"]) == ("program", teacher.stat().st_size)
    stopped, lines = workspace(tmp_path / "stopped")
    step = StageTraining._step

    def last(self: StageTraining, *arguments: Any) -> None:
        step(self, *arguments)
        stopped.stop_requested = True

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(StageTraining, "_step", last)
        run(spec, stopped)
    resumed, _ = workspace(tmp_path / "resumed")
    run(spec, resumed, stopped.out / events(lines, "checkpoint")[-1]["path"])
    one, other = (load_file(place.out / "student.safetensors") for place in (where, resumed))
    assert same(one, other)


def test_evaluate_checkpoint_measures_an_onnx_file(tmp_path: Path):
    data = write_arrays(tmp_path / "blobs.npz")
    torch.manual_seed(0)
    network = models.build("convnet4", 3, 1)
    teacher = exported(network, tmp_path / "t.onnx", torch.zeros(2, 1, 8, 8), ANY_BATCH)
    report = evaluate.evaluate_checkpoint(teacher, None, Dataset(source=f"file:{data}"), workspace(tmp_path)[0])
    assert report["architecture"] == "program" and report["test_samples"] == 30
    with np.load(data) as arrays:
        pixels = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2)
        mean, std = report["preprocessing"]["mean"], report["preprocessing"]["std"]
        right = logits(Classifier(network, mean, std), pixels).logits.argmax(1) == torch.from_numpy(arrays["y_test"])
    assert report["accuracy"] == pytest.approx(right.double().mean().item())
