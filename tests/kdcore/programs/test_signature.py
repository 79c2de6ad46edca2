from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from base.errors import TeacherMismatch
from kdcore import programs
from kdcore.programs.signature import DYNAMIC_BATCH
from tests.kdcore.programs.making import MODEL, exported, rewritten

IMAGES = torch.zeros(2, 3, 8, 8)


class Does(nn.Module):
    """A network that is one function of its inputs, with a weight to have one."""

    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5))
        self.does = forward

    def forward(self, images: Tensor) -> object:
        return self.does(images.mean((2, 3)) @ self.weight)


def refusal(network: nn.Module, path: Path, *images: Tensor, **options: object) -> TeacherMismatch:
    file = exported(network, path / "t.pt2", *images, **options)  # type: ignore[arg-type]
    with pytest.raises(TeacherMismatch) as caught:
        programs.inspect(file)
    return caught.value


def test_logits_a_fixed_batch_is_refused_with_the_way_out(tmp_path: Path):
    error = refusal(Does(lambda logits: logits), tmp_path, IMAGES, shapes=None)
    assert error.message == "the program was exported for batches of exactly 2" and error.hint == DYNAMIC_BATCH


@pytest.mark.parametrize(
    ("forward", "images", "words"),
    [
        (lambda x: (x, x + 1), IMAGES, "returns 2 values, not one tensor of logits"),
        (lambda x: (x, 3), IMAGES, "returns 2 values, not one tensor of logits"),
        (lambda x: x.half(), IMAGES, "returns float16 of shape any x 5, not float32 N x K"),
        (lambda x: x.argmax(1), IMAGES, "returns int64 of shape any, not float32 N x K"),
        (lambda x: x.sum(), IMAGES, "returns float32 of shape one number, not float32 N x K"),
        (lambda x: x[:1], IMAGES, "makes 1 x 5 numbers of any x 3 x 8 x 8, not a number of logits for each image"),
        (lambda x: x.T, IMAGES, "makes 5 x any numbers of"),
        (lambda x: x.reshape(-1, 1), IMAGES, "makes any x 1 numbers of"),
        (lambda x: x @ x.T, IMAGES, "makes any x any numbers of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_returns_no_logits_is_refused(tmp_path: Path, forward: Callable[..., object], images: Tensor, words: str):
    assert words in refusal(Does(forward), tmp_path, images).message


class Bare(nn.Module):
    def forward(self, one: Tensor, other: Tensor | None = None) -> Tensor:
        return (one if other is None else one + other).float().flatten(1)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((IMAGES, IMAGES), "takes 2 inputs, not one tensor of images"),
        ((IMAGES.half(),), "takes float16 of shape any x 3 x 8 x 8, not float32 N x C x H x W"),
        ((IMAGES.to(torch.uint8),), "takes uint8 of"),
        ((IMAGES.flatten(1),), "takes float32 of shape any x 192, not"),
    ],
)
def test_inputs_what_takes_no_images_is_refused(tmp_path: Path, inputs: tuple[Tensor, ...], words: str):
    shapes = tuple({0: Dim("batch")} for _ in inputs)
    assert words in refusal(Bare(), tmp_path, *inputs, shapes=shapes).message


def test_shape_an_option_left_alone_is_no_input(tmp_path: Path):
    shapes = ({0: Dim("batch")}, None)
    assert programs.inspect(exported(Bare(), tmp_path / "t.pt2", IMAGES, None, shapes=shapes)).num_classes == 192  # type: ignore[arg-type]


def test_logits_sizes_may_be_any_and_batches_bounded(tmp_path: Path):
    shapes = ({0: Dim("batch", max=64), 2: Dim("height"), 3: Dim("width")},)
    facts = programs.inspect(exported(Does(lambda logits: logits), tmp_path / "t.pt2", IMAGES, shapes=shapes))
    assert facts.image_size == (None, None) and facts.batch == 64


def test_shape_fixed_sizes_are_known(program: Path):
    facts = programs.inspect(program)
    assert facts.image_size == (8, 8) and facts.batch == "any"


class Counting(nn.Module):
    """Remembers how often it ran, as a network in train mode does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.runs.add_(1)
        return images.mean((2, 3)) + self.runs


def test_shape_what_changes_itself_is_refused(tmp_path: Path):
    assert "changes its own buffers" in refusal(Counting(), tmp_path, IMAGES, plainer=True).message


@pytest.mark.parametrize(
    ("kind", "words"),
    [("custom_obj", "more than tensors: a custom_obj"), ("token", "more than tensors: a token")],
)
def test_inputs_that_are_no_tensors_are_refused(program: Path, tmp_path: Path, kind: str, words: str):
    def change(model: dict) -> None:
        model["graph_module"]["signature"]["input_specs"].insert(0, {kind: {"arg": {"name": "o"}}})

    with pytest.raises(TeacherMismatch, match=words):
        programs.inspect(rewritten(program, tmp_path / "t.pt2", {MODEL: change}))
