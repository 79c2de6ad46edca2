"""The default taps of each method."""

from pydantic import TypeAdapter

from kdcore.catalog import architecture
from kdcore.spec import Method


def chosen(method: object, student: str, teacher: str) -> list[tuple[str, str]]:
    options = TypeAdapter(Method).validate_python(method)
    return [(pair.student, pair.teacher) for pair in options.choose(architecture(student), architecture(teacher))]


def test_choose_stages_pairs_twins_one_by_one():
    assert chosen("attention", "resnet20", "resnet56") == [(layer, layer) for layer in ("layer1", "layer2", "layer3")]


def test_choose_stages_pairs_from_the_deepest_backwards():
    """Three stages against five: maps of 8 x 8 at the end of resnet56, of 2 x 2 at that of vgg8."""
    assert chosen("nst", "vgg8", "resnet56") == [("block2", "layer1"), ("block3", "layer2"), ("block4", "layer3")]
    assert chosen("nst", "resnet20", "vgg13") == [("layer1", "block2"), ("layer2", "block3"), ("layer3", "block4")]


def test_choose_embedding_is_the_classifiers_input():
    for name in ("rkd", "pkt", "cc", "crd", "feature"):
        assert chosen(name, "resnet20", "vgg13") == [("fc@in", "classifier@in")]
    assert chosen("crd", "torchvision/squeezenet1_0", "resnet56") == []


def test_choose_middle_stage_and_last_stage():
    assert chosen("fitnet", "resnet20", "resnet56") == [("layer2", "layer2")]
    assert chosen("fitnet", "vgg8", "vgg13") == [("block2", "block2")]
    assert chosen("fitnet", "torchvision/mobilenet_v2", "torchvision/resnet50") == [("features.13", "layer3")]
    for name in ("sp", "factor_transfer"):
        assert chosen(name, "vgg8", "resnet56") == [("block4", "layer3")]


def test_choose_flows_begins_at_the_input_of_the_first_stage():
    flows = [(path, path) for path in ("layer1@in", "layer1", "layer2", "layer3")]
    assert chosen("fsp", "resnet20", "resnet56") == flows
    nhwc = "features.1@nhwc"
    assert chosen("fsp", "torchvision/swin_t", "torchvision/swin_b")[0] == (nhwc, nhwc), "its input has no tap"


def test_choose_preactivations_are_before_the_relu():
    found = chosen("activation_boundary", "resnet20", "wrn_40_2")
    assert found[0] == ("layer1.2.relu@in", "block2.layer.0.bn1") and len(found) == 3
    assert chosen("activation_boundary", "resnet20", "shufflenetv2") == []
    assert chosen("activation_boundary", "shufflenetv2", "resnet56")[0] == ("layer1", "layer1.8.relu@in")


def test_choose_margins_needs_batch_norms_of_the_teacher():
    teacher = architecture("resnet56")
    assert [path for _, path in chosen("ofd", "vgg8", "resnet56")] == teacher.preactivations
    assert chosen("ofd", "resnet20", "torchvision/vgg11") == [], "no batch norm before its ReLU"


def test_with_places_of_ofd_takes_the_margins_of_the_chosen_taps():
    student = architecture("resnet20").model_copy(update={"preactivations": ["a", "b"]})
    method = TypeAdapter(Method).validate_python("ofd").with_places(student, architecture("resnet56"))
    assert method.margins == ("layer2.8.bn2", "layer3.8.bn2")


def test_choose_review_ends_at_the_embeddings():
    assert chosen("reviewkd", "resnet20", "resnet56") == [
        ("layer1", "layer1.8.relu@in"),
        ("layer2", "layer2.8.relu@in"),
        ("layer3", "layer3.8.relu@in"),
        ("fc@in", "fc@in"),
    ]
    assert chosen("reviewkd", "torchvision/squeezenet1_0", "resnet56") == []
