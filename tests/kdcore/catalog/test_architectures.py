import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from kdcore.catalog.architectures import ARCHITECTURES, TORCHVISION, UnknownName, architecture
from kdcore.catalog.facts import ArchitectureFacts
from kdcore.spec.vocabulary import TapPath


def test_architectures_are_listed_by_their_name():
    assert all(facts.name == name for name, facts in ARCHITECTURES.items())


def test_parameters_equal_a_count_by_hand():
    """convnet4 on grey images, ten classes: 36 + 288 + 576 weights, 2 * (4 + 8 + 8) of batch norm, 8 * 10 + 10."""
    assert architecture("convnet4").parameters(10, 1) == 900 + 40 + 90


def test_architecture_finds_torchvision_by_its_prefix():
    facts = architecture("torchvision/resnet18")
    assert (facts.source, facts.channels, facts.parameters(1000)) == ("torchvision", 3, 11_689_512)


def test_torchvision_has_eighty_classifiers():
    assert len(TORCHVISION) == 80


def test_architecture_accepts_any_timm_name_without_numbers():
    facts = architecture("timm/resnet18.a1_in1k")
    assert (facts.source, facts.channels, facts.parameters(10)) == ("timm", "any", None)


@pytest.mark.parametrize("name", ["timm/", "timm/../secrets", "timm/hf-hub:somebody/model", "timm/a/b"])
def test_architecture_refuses_a_timm_address(name: str):
    with pytest.raises(UnknownName):
        architecture(name)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("resnet18", "torchvision/resnet18"),
        ("ResNet-56", "resnet56"),
        ("wrn-40-2", "wrn_40_2"),
        ("shufflenet", "shufflenetv1"),
    ],
)
def test_unknown_name_suggests_similar_ones(wrong: str, right: str):
    with pytest.raises(UnknownName) as caught:
        architecture(wrong)
    assert right in caught.value.nearest
    assert wrong in str(caught.value) and right in str(caught.value)


def test_unknown_name_has_no_suggestion_without_a_similar_one():
    with pytest.raises(UnknownName) as caught:
        architecture("q9")
    assert caught.value.nearest == [] and "did you mean" not in str(caught.value)


def test_unknown_name_is_a_value_error():
    """So that pydantic turns one into a fault of its field."""
    assert issubclass(UnknownName, ValueError)


def test_architecture_of_a_transformer_has_one_image_size():
    facts = architecture("torchvision/vit_b_16")
    assert facts.min_image == facts.max_image == 224


@pytest.mark.parametrize("facts", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_architecture_facts_have_entries_for_each_tap(facts: ArchitectureFacts):
    assert facts.taps and len(facts.tap_widths) == len(facts.taps)
    assert len(facts.preactivations) in (0, len(facts.taps)) and len(facts.margins) in (0, len(facts.preactivations))


@pytest.mark.parametrize("facts", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_architecture_taps_are_valid_tap_paths(facts: ArchitectureFacts):
    for path in (*facts.taps, *facts.preactivations, *([facts.embedding] if facts.embedding else [])):
        TypeAdapter(TapPath).validate_python(path)


@pytest.mark.parametrize(
    ("name", "preactivation", "margin"),
    [
        ("resnet56", "layer1.8.relu@in", "layer1.8.bn2"),
        ("resnet8x4", "layer1.0.relu@in", "layer1.0.bn2"),
        ("resnet20_option_a", "layer1.2.relu@in", "layer1.2.bn2"),
        ("resnet34_cifar", "layer1.2.relu@in", "layer1.2.bn2"),
        ("resnet50_cifar", "layer1.2.relu@in", "layer1.2.bn3"),
        ("wrn_40_2", "block2.layer.0.bn1", "block2.layer.0.bn1"),
        ("vgg13", "block0.4", "block0.4"),
        ("mobilenetv2_x0_5", "blocks.1", "blocks.1.1.conv.7"),
        ("torchvision/resnet34", "layer1.2.last_relu@in", "layer1.2.bn2"),
        ("torchvision/vgg11_bn", "features.1", "features.1"),
    ],
)
def test_architecture_preactivations_and_margins_of_the_first_stage(name: str, preactivation: str, margin: str):
    assert (architecture(name).preactivations[0], architecture(name).margins[0]) == (preactivation, margin)


def test_architecture_taps_of_a_transformer_are_quarters():
    assert [tap.removeprefix("encoder.layers.") for tap in architecture("torchvision/vit_l_32").taps] == [
        "encoder_layer_5@tokens",
        "encoder_layer_11@tokens",
        "encoder_layer_17@tokens",
        "encoder_layer_23@tokens",
    ]


def test_architectures_load_no_torch():
    program = "import sys, kdcore.catalog.architectures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
