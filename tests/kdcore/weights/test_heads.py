"""Classifiers of several layers are built as they are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from base.errors import TeacherMismatch
from kdcore import models, weights
from kdcore.catalog import UnknownName, architecture
from kdcore.models.networks import classifier_of
from kdcore.spec.doubts import model_warnings

NAME = "resnet8"
WIDTH = 64


def with_head(head: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    network = models.build(NAME, 10)
    network.fc = head
    return network.eval()


HEADS: dict[str, tuple[nn.Module, str]] = {
    "relu": (nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, 10)), f"{NAME}+relu20"),
    "dropouts": (
        nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10)),
        f"{NAME}+relu20",
    ),
    "batch norm": (
        nn.Sequential(nn.Linear(WIDTH, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10)),
        f"{NAME}+bn_relu20",
    ),
    "three": (
        nn.Sequential(nn.Linear(WIDTH, 20), nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)),
        f"{NAME}+relu20+relu30",
    ),
    "no activation": (nn.Sequential(nn.Linear(WIDTH, 20), nn.Linear(20, 10)), f"{NAME}+linear20"),
    "a dropout alone": (nn.Sequential(nn.Dropout(), nn.Linear(WIDTH, 10)), NAME),
}


@pytest.mark.parametrize(("head", "name"), HEADS.values(), ids=HEADS)
def test_deep_heads_are_built_with_the_same_answers(tmp_path: Path, head: nn.Module, name: str):
    network = with_head(head)
    torch.save(network.state_dict(), tmp_path / "t.pth")
    teacher = weights.open_teacher(tmp_path / "t.pth", NAME)
    assert (teacher.facts.architecture, teacher.facts.num_classes) == (name, 10)
    built = models.build(name, 10).eval()
    weights.load_into(built, teacher.state, "the teacher")
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(built(images), network(images))
    assert teacher.facts.parameters == architecture(name).parameters(10)
    guessed = [one.code for one in model_warnings(teacher.facts) if one.code == "head_activation_guessed"]
    assert guessed == (["head_activation_guessed"] if "relu" in name else [])


def test_deep_heads_have_the_activation_that_is_named(tmp_path: Path):
    network = with_head(nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 10)))
    torch.save(network.state_dict(), tmp_path / "t.pth")
    teacher = weights.open_teacher(tmp_path / "t.pth", f"{NAME}+tanh20")
    built = models.build(teacher.facts.architecture, 10).eval()
    weights.load_into(built, teacher.state, "the teacher")
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(built(images), network(images))
    assert teacher.facts.loading.activation_guessed is None


def test_deep_heads_under_two_names_follow_each_other(tmp_path: Path):
    state = dict(with_head(nn.Linear(WIDTH, 20)).state_dict())
    state |= {"fc2.weight": torch.ones(7, 20), "fc2.bias": torch.ones(7)}
    torch.save(state, tmp_path / "t.pth")
    facts = weights.inspect(tmp_path / "t.pth", None)
    assert (facts.architecture, facts.num_classes) == (f"{NAME}+relu20", 7)


def test_deep_heads_are_no_projection_beside_the_classifier(tmp_path: Path):
    state: dict[str, Tensor] = dict(models.build(NAME, 10).state_dict())
    state |= {"projector.0.weight": torch.ones(20, WIDTH), "projector.0.bias": torch.ones(20)}
    state |= {"projector.2.weight": torch.ones(8, 20), "projector.2.bias": torch.ones(8)}
    torch.save(state, tmp_path / "t.pth")
    facts = weights.inspect(tmp_path / "t.pth", NAME)
    assert (facts.architecture, facts.loading.ignored) == (NAME, 4)


def test_deep_heads_of_other_widths_than_named_are_refused(tmp_path: Path):
    torch.save(with_head(HEADS["relu"][0]).state_dict(), tmp_path / "t.pth")
    with pytest.raises(TeacherMismatch, match="20 x 64 in the file, 30 x 64 in the network"):
        weights.inspect(tmp_path / "t.pth", f"{NAME}+relu30")


@pytest.mark.parametrize(
    "name", [f"{NAME}+relu", f"{NAME}+softmax20", f"{NAME}+relu0", f"{NAME}+", "torchvision/squeezenet1_1+relu9"]
)
def test_architecture_refuses_hidden_layers_that_cannot_be_built(name: str):
    with pytest.raises(UnknownName):
        architecture(name)


@pytest.mark.parametrize(
    ("name", "path"),
    [("resnet8", "fc"), ("torchvision/mobilenet_v3_small", "classifier.3"), ("timm/test_resnet", "fc")],
)
def test_classifier_of_a_network_is_its_last_linear_layer(name: str, path: str):
    assert classifier_of(models.build(name, 3), name) == path
    deep = models.build(f"{name}+gelu5", 3)
    assert [type(one).__name__ for one in deep.get_submodule(path)] == ["Linear", "GELU", "Linear"]


def test_deep_heads_keep_their_embedding_before_the_last_layer():
    facts = architecture("resnet8+bn_relu20+linear30")
    assert (facts.embedding, facts.embedding_width) == ("fc.4@in", 30)
    network = models.build("resnet8+bn_relu20+linear30", 10)
    assert sum(one.numel() for one in network.parameters()) == facts.parameters(10)
