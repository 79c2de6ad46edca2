"""The architecture of a file that does not name it."""

import json
from importlib.resources import files

import pytest
import torch
from torch import Tensor

from base.errors import TeacherMismatch
from kdcore.models.networks import skeleton
from kdcore.weights import finding
from kdcore.weights.content import Content
from kdcore.weights.names import Flat, learned


def empty(name: str, classes: int = 7, channels: int = 3) -> dict[str, Tensor]:
    state = skeleton(name, classes, channels).state_dict()
    return {key: torch.empty(value.shape, device="meta") for key, value in state.items()}


def found(state: dict[str, Tensor], **notes: object) -> tuple[str, list[str]]:
    return finding.architecture_of(Flat(state, True), Content({**notes, "model": state}, {}, "pytorch"))


@pytest.mark.parametrize(
    "name",
    [
        *("resnet20", "resnet20_option_a", "resnet56", "vgg8", "wrn_16_2", "shufflenetv2", "convnet8"),
        *("torchvision/resnet18", "torchvision/mobilenet_v3_small"),
        *("timm/test_resnet", "timm/mobilenetv3_small_050", "timm/resnet18d"),
    ],
)
def test_architecture_of_a_file_is_found_by_its_size_and_names(name: str):
    assert found(empty(name))[0] == name


@pytest.mark.parametrize("classifier", ["fc", "linear"])
@pytest.mark.parametrize("shortcut", ["downsample", "shortcut"])
def test_architecture_of_a_resnet18_with_a_stem_for_small_images_is_found(shortcut: str, classifier: str):
    state = empty("resnet18_cifar", 10)
    renamed = {
        name.replace(".downsample.", f".{shortcut}.").replace("linear.", f"{classifier}."): value
        for name, value in state.items()
    }
    assert found(renamed)[0] == "resnet18_cifar"


def test_architecture_of_grey_images_is_found():
    assert found(empty("resnet8", 10, channels=1))[0] == "resnet8"


def test_architecture_of_behind_prefixes_and_beside_a_loss_is_found():
    state = {f"model.{name}": value for name, value in empty("resnet20").items()}
    assert found({**state, "criterion.weight": torch.empty(7)})[0] == "resnet20"


def test_architecture_of_a_file_names_others_of_the_same_names_and_shapes():
    name, others = found(empty("torchvision/resnet18"))
    assert name == "torchvision/resnet18" and "timm/resnet18" in others


def test_architecture_of_what_a_trainer_noted_comes_first():
    assert found(empty("torchvision/resnet18"), arch="resnetblur18")[0] == "timm/resnetblur18"
    assert found(empty("torchvision/resnet18"), arch="resnet34")[0] == "torchvision/resnet18"


def test_architecture_of_an_unknown_network_says_how_to_name_it():
    with pytest.raises(TeacherMismatch, match="does not say its architecture") as caught:
        found({"a.weight": torch.empty(3, 4), "a.bias": torch.empty(3)})
    assert "GET /v1/architectures" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "asked", "hint"),
    [
        ("resnet14", "resnet20", "its 175,063 parameters are those of resnet14"),
        ("timm/resnet18d", "torchvision/resnet18", "are those of timm/resnet18d"),
        ("resnet20", "resnet20", "another implementation"),
    ],
)
def test_likely_hint_never_names_what_was_asked_for(name: str, asked: str, hint: str):
    said = str(finding.likely_hint(Flat(empty(name), True), asked))
    assert f"are those of {asked}" not in said
    assert hint in said


def test_sizes_of_timms_networks_are_those_that_are_built():
    sizes = json.loads(files("kdcore.catalog").joinpath("timm_parameters.json").read_text())
    assert len(sizes) > 1000
    for name in ("test_resnet", "test_vit", "mobilenetv3_small_050"):
        if name in sizes:
            body, each_class = sizes[name]
            assert learned(empty(f"timm/{name}", 11)) == body + 11 * each_class
