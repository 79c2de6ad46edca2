"""The room's front door: `open_program` and `inspect`."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from base.errors import TeacherMismatch
from kdcore import __main__ as engine
from kdcore import models, programs
from kdcore.catalog import DatasetFacts
from kdcore.catalog.facts import ProgramFacts
from tests.kdcore.programs.making import exported

DATA = DatasetFacts(
    kind="arrays", num_classes=10, class_names=list("0123456789"), channels=1, image_size=(8, 8), train=400, test=100,
    mean=[0.5], std=[0.25],
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "plainer"), [("resnet8", False), ("resnet8", True), ("torchvision/squeezenet1_1", False)]
)
def test_logits_are_those_of_the_network(tmp_path: Path, name: str, plainer: bool):
    torch.manual_seed(0)
    network, images = models.build(name, 7).eval(), torch.randn(5, 3, 32, 32)
    program = programs.open_program(exported(network, tmp_path / "t.pt2", images[:2], plainer=plainer))
    assert program.facts.parameters == sum(parameter.numel() for parameter in network.parameters())
    with torch.no_grad():
        for count in (5, 2, 1):
            assert torch.allclose(program(images[:count]), network(images[:count]), rtol=0, atol=1e-6)


def test_what_an_inspection_sees(program: Path, network: nn.Module):
    assert programs.inspect(program) == ProgramFacts(
        num_classes=10,
        channels=1,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        bytes=program.stat().st_size,
        digest=f"sha256:{hashlib.sha256(program.read_bytes()).hexdigest()}",
        image_size=(8, 8),
    )


def test_facts_come_back_from_json(program: Path):
    facts = programs.inspect(program)
    assert ProgramFacts.model_validate_json(facts.model_dump_json()) == facts


def test_the_command_answers_with_facts_or_with_the_reason(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "no.pt2").write_bytes(b"PK nothing")
    answers = []
    for path in (program, tmp_path / "no.pt2"):
        monkeypatch.setattr(sys, "argv", ["kdcore", "inspect", "program", str(path)])
        assert engine.main() == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == {"ok": True, "facts": programs.inspect(program).model_dump(mode="json")}
    assert answers[1]["ok"] is False and answers[1]["error"]["code"] == "teacher_mismatch"


def test_images_that_fit(program: Path):
    assert programs.open_program(program, DATA).facts.num_classes == 10


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"channels": 3}, "images of 1 channels, the data has 3"),
        ({"image_size": (8, 16)}, "images of 8 x 8 pixels, the data has 8 x 16"),
    ],
)
def test_images_that_do_not_fit_are_refused(program: Path, data: dict[str, object], words: str):
    with pytest.raises(TeacherMismatch, match=words):
        programs.open_program(program, DATA.model_copy(update=data))


class Head(nn.Module):
    """Logits of the mean colour, and what a test does to them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return self.changed(images.mean((2, 3)) @ self.weight)

    def changed(self, logits: Tensor) -> Tensor:
        return logits


class Standardized(Head):
    def changed(self, logits: Tensor) -> Tensor:
        return (logits - logits.mean(0)) / (logits.std(0, correction=0) + 1)


class Infinite(Head):
    def changed(self, logits: Tensor) -> Tensor:
        return logits / 0


@pytest.mark.parametrize(
    ("network", "words"),
    [(Standardized(), "depend on the batch around it"), (Infinite(), "no numbers")],
    ids=["batch", "infinite"],
)
def test_logits_that_teach_nothing_are_refused(tmp_path: Path, network: nn.Module, words: str):
    with pytest.raises(TeacherMismatch, match=words):
        programs.open_program(exported(network, tmp_path / "t.pt2", torch.randn(2, 3, 8, 8)))


def test_a_program_for_any_size_is_tried_on_the_datas(tmp_path: Path):
    shapes = ({0: Dim("batch"), 2: Dim("height"), 3: Dim("width")},)
    path = exported(Infinite(), tmp_path / "t.pt2", torch.randn(2, 3, 8, 8), shapes=shapes)
    assert programs.open_program(path).facts.image_size == (None, None)
    with pytest.raises(TeacherMismatch, match="no numbers"):
        programs.open_program(path, DATA.model_copy(update={"channels": 3}))


def test_images_that_are_too_small_for_it(tmp_path: Path):
    network = nn.Sequential(nn.Conv2d(1, 10, 7), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    shapes = ({0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO},)
    path = exported(network, tmp_path / "t.pt2", torch.randn(2, 1, 16, 16), shapes=shapes)
    assert programs.open_program(path, DATA).facts.image_size == (None, None)
    with pytest.raises(TeacherMismatch, match=r"fails on images of 4 x 4 pixels: .*[Kk]ernel"):
        programs.open_program(path, DATA.model_copy(update={"image_size": (4, 4)}))


@torch.library.custom_op("distillery_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Own(Head):
    def changed(self, logits: Tensor) -> Tensor:
        return twice(logits)


def test_an_operator_of_ones_own_is_refused_by_name(tmp_path: Path):
    with pytest.raises(TeacherMismatch, match=r"calls torch\.ops\.distillery_test\.twice\.default") as caught:
        programs.inspect(exported(Own(), tmp_path / "t.pt2", torch.zeros(2, 3, 8, 8)))
    assert "PyTorch's own layers" in str(caught.value.hint)
