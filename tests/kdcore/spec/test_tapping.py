"""Where a method looks, if a spec does not say."""

import pytest
from pydantic import TypeAdapter

from kdcore.catalog import architecture
from kdcore.spec.methods import Method, Pair
from kdcore.spec.tapping import by_gradient, choose, looks_inside, margins, takes_taps


def chosen(method: object, student: str, teacher: str) -> list[tuple[str, str]]:
    options = TypeAdapter(Method).validate_python(method)
    return [(pair.student, pair.teacher) for pair in choose(options, architecture(student), architecture(teacher))]


def test_stages_of_twins_are_matched_one_by_one():
    assert chosen("attention", "resnet20", "resnet56") == [(layer, layer) for layer in ("layer1", "layer2", "layer3")]


def test_a_network_of_fewer_stages_is_held_against_the_deepest_ones():
    """Three stages against five: maps of 8 x 8 at the end of resnet56, of 2 x 2 at that of vgg8."""
    assert chosen("nst", "vgg8", "resnet56") == [("block2", "layer1"), ("block3", "layer2"), ("block4", "layer3")]
    assert chosen("nst", "resnet20", "vgg13") == [("layer1", "block2"), ("layer2", "block3"), ("layer3", "block4")]


def test_embeddings_are_the_classifiers_inputs():
    for name in ("rkd", "pkt", "cc", "crd", "feature"):
        assert chosen(name, "resnet20", "vgg13") == [("fc@in", "classifier@in")]
    assert chosen("crd", "torchvision/squeezenet1_0", "resnet56") == []


def test_hints_are_given_in_the_middle_and_likeness_at_the_end():
    assert chosen("fitnet", "resnet20", "resnet56") == [("layer2", "layer2")]
    assert chosen("fitnet", "vgg8", "vgg13") == [("block2", "block2")]
    assert chosen("fitnet", "torchvision/mobilenet_v2", "torchvision/resnet50") == [("features.13", "layer3")]
    for name in ("sp", "factor_transfer"):
        assert chosen(name, "vgg8", "resnet56") == [("block4", "layer3")]


def test_the_first_flow_begins_where_the_first_stage_does():
    flows = [(path, path) for path in ("layer1@in", "layer1", "layer2", "layer3")]
    assert chosen("fsp", "resnet20", "resnet56") == flows
    nhwc = "features.1@nhwc"
    assert chosen("fsp", "torchvision/swin_t", "torchvision/swin_b")[0] == (nhwc, nhwc), "its input has no tap"


def test_boundaries_lie_before_the_relu():
    found = chosen("activation_boundary", "resnet20", "wrn_40_2")
    assert found[0] == ("layer1.2.relu@in", "block2.layer.0.bn1") and len(found) == 3
    assert chosen("activation_boundary", "resnet20", "shufflenetv2") == []
    assert chosen("activation_boundary", "shufflenetv2", "resnet56")[0] == ("layer1", "layer1.8.relu@in")


def test_margins_are_those_of_the_taps_that_are_matched():
    teacher = architecture("resnet56")
    pairs = chosen("ofd", "vgg8", "resnet56")
    assert [path for _, path in pairs] == teacher.preactivations
    two = tuple(Pair(student="x", teacher=path) for path in teacher.preactivations[1:])
    assert margins(two, teacher) == ("layer2.8.bn2", "layer3.8.bn2")
    assert chosen("ofd", "resnet20", "torchvision/vgg11") == [], "no batch norm before its ReLU"


def test_a_review_ends_at_the_embeddings():
    assert chosen("reviewkd", "resnet20", "resnet56") == [
        ("layer1", "layer1.8.relu@in"),
        ("layer2", "layer2.8.relu@in"),
        ("layer3", "layer3.8.relu@in"),
        ("fc@in", "fc@in"),
    ]
    assert chosen("reviewkd", "torchvision/squeezenet1_0", "resnet56") == []


@pytest.mark.parametrize(
    ("method", "taps", "gradient"),
    [
        ("kd", False, False),
        ("supervised", False, False),
        ("byot", False, False),
        ("attention", True, False),
        ({"name": "attention", "mapping": "gradient"}, False, True),
        ("crd", True, False),
    ],
    ids=str,
)
def test_a_method_looks_at_logits_at_activations_or_at_a_gradient(method, taps, gradient):
    options = TypeAdapter(Method).validate_python(method)
    assert (takes_taps(options), by_gradient(options), looks_inside(options)) == (taps, gradient, taps or gradient)
