import json
from pathlib import Path

import pytest
import torch
from torch import nn

from base.errors import TeacherMismatch
from kdcore import programs
from kdcore.classifier import Classifier
from kdcore.teacher import FrozenTeacher
from tests.kdcore.programs.making import MODEL, WEIGHTS, exported, rewritten


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_it_stays_in_eval_mode_and_has_no_gradients(program: Path, network: nn.Module, images: torch.Tensor):
    teacher = programs.open_program(program).train()
    images.requires_grad_()
    logits = teacher(images)
    assert not logits.requires_grad and not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.no_grad():
        assert torch.equal(logits, network(images)) and torch.equal(teacher(images), logits)


def test_it_computes_in_full_precision_inside_autocast(program: Path, images: torch.Tensor):
    teacher = programs.open_program(program)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(images), teacher(images.bfloat16().float().lerp(images, 1)))
        assert teacher(images.bfloat16()).dtype == torch.float32


class Viewed(nn.Module):
    """Its views work in the memory format that it was traced with, and in no other."""

    def __init__(self, traced: torch.memory_format) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 4)
        self.last = traced == torch.channels_last
        self.to(memory_format=traced)  # type: ignore[call-overload]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)
        rows = features.permute(0, 2, 3, 1) if self.last else features
        return self.head(rows.view(images.shape[0], -1))


@pytest.mark.parametrize("traced", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("asked", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_its_own_memory_format_is_kept(tmp_path: Path, traced: torch.memory_format, asked: torch.memory_format):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 6, 6)
    network = Viewed(traced).eval()
    of_its_format = images.to(memory_format=traced)
    teacher = programs.open_program(exported(network, tmp_path / "t.pt2", of_its_format))
    teacher = teacher.to(memory_format=asked)  # type: ignore[call-overload]
    assert torch.allclose(teacher(images.to(memory_format=asked)), network(of_its_format), atol=1e-6)


def test_a_classifier_teaches_with_it(program: Path, network: nn.Module):
    pixels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = Classifier(network, [0.3], [0.4])(pixels).logits
        teacher = FrozenTeacher(Classifier(programs.open_program(program), [0.3], [0.4], bf16=True)).train()
        assert torch.allclose(teacher.classifier(pixels).logits, expected, atol=1e-6)


def test_all_of_it_moves(program: Path):
    moved = programs.open_program(program).to("meta")
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}


def test_names_that_a_module_would_not_allow(program: Path, tmp_path: Path, images: torch.Tensor):
    """Graph names are the file's own."""

    def change(model: dict) -> None:
        text = json.dumps(model)
        for name, odd in (("p_fc_weight", "forward"), ("p_fc_bias", "a.b"), ("b_layer1_1_running_mean", "")):
            text = text.replace(f'"{name}"', f'"{odd}"')
        model.update(json.loads(text))

    path = rewritten(program, tmp_path / "t.pt2", {MODEL: change})
    assert torch.equal(programs.open_program(path)(images), programs.open_program(program)(images))


def test_an_answer_of_another_shape_than_promised_is_refused(program: Path, tmp_path: Path):
    def change(config: dict) -> None:
        for name, size in (("fc.weight", [5, 16]), ("fc.bias", [5])):
            meta = config["config"][name]["tensor_meta"]
            meta["sizes"] = [{"as_int": side} for side in size[: len(meta["sizes"])]]

    path = rewritten(program, tmp_path / "t.pt2", {WEIGHTS: change})
    with pytest.raises(TeacherMismatch, match="the program"):
        programs.open_program(path)
