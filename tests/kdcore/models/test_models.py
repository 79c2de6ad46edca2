"""All networks by name: counts against the published table, shapes, taps, and that training reaches every weight."""

import pytest
import torch

from base.errors import SpecInvalid
from kdcore import models
from kdcore.catalog.architectures import ARCHITECTURES, FIELD, architecture
from kdcore.models.networks import skeleton
from kdcore.models.taps import Taps

# Computed from the distillation papers' reference definitions. name: (100 classes, 10 classes)
PUBLISHED = {
    "resnet8": (83_892, 78_042),
    "resnet14": (181_108, 175_258),
    "resnet20": (278_324, 272_474),
    "resnet32": (472_756, 466_906),
    "resnet44": (667_188, 661_338),
    "resnet56": (861_620, 855_770),
    "resnet110": (1_736_564, 1_730_714),
    "resnet8x4": (1_233_540, 1_210_410),
    "resnet32x4": (7_433_860, 7_410_730),
    "resnet18_cifar": (11_220_132, 11_173_962),
    "resnet34_cifar": (21_328_292, 21_282_122),
    "resnet50_cifar": (23_705_252, None),
    "wrn_16_1": (180_916, None),
    "wrn_16_2": (703_284, None),
    "wrn_40_1": (569_780, None),
    "wrn_40_2": (2_255_156, 2_243_546),
    "vgg8": (3_965_028, None),
    "vgg11": (9_277_284, None),
    "vgg13": (9_462_180, None),
    "vgg16": (14_774_436, None),
    "vgg19": (20_086_692, None),
    "mobilenetv2_x0_5": (812_836, None),
    "shufflenetv1": (949_258, None),
    "shufflenetv2": (1_355_528, None),
    "resnet20_option_a": (None, 269_722),
}
QUICK = ["resnet8", "resnet8_option_a", "resnet8x4", "wrn_16_1", "convnet4", "mobilenetv2_x0_5", "shufflenetv2"]


def count(name: str, num_classes: int, channels: int = 3) -> int:
    return sum(parameter.numel() for parameter in skeleton(name, num_classes, channels).parameters())


def images(count: int, channels: int, size: int) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_skeleton_parameters_are_the_published_ones(name: str):
    for num_classes, published in zip((100, 10), PUBLISHED[name], strict=True):
        assert published in (None, count(name, num_classes))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_skeleton_the_catalogue_counts_as_the_network_does(name: str):
    facts = architecture(name)
    builds = [(100, 3), (10, 3), (10, 1)] if facts.channels == "any" else [(7, 3)]
    for num_classes, channels in builds:
        assert facts.parameters(num_classes, channels) in (None, count(name, num_classes, channels))


def test_build_only_odd_classifiers_go_uncounted():
    assert {name for name, facts in ARCHITECTURES.items() if facts.parameters(10) is None} == {
        "torchvision/maxvit_t",
        "torchvision/squeezenet1_0",
        "torchvision/squeezenet1_1",
    }


def test_build_every_name_of_ours_is_in_the_catalogue_and_the_reverse():
    assert list(models.NETWORKS) == list(FIELD)


@pytest.mark.parametrize("name", FIELD)
def test_build_taps_and_embedding_are_where_the_catalogue_says(name: str):
    """At the smallest image: taps shrink from stage to stage, the embedding has its width, logits their shape."""
    facts = architecture(name)
    network = models.build(name, 5, channels=2).eval()
    taps = Taps(network, [*facts.taps, facts.embedding])
    with torch.no_grad():
        logits = network(images(2, 2, facts.min_image))
    seen = taps.read()
    sizes = [seen[path].shape[2] for path in facts.taps]
    assert logits.shape == (2, 5)
    assert seen[facts.embedding].shape == (2, facts.embedding_width)
    assert all(seen[path].ndim == 4 for path in facts.taps) and sizes == sorted(sizes, reverse=True)


TORCHVISION_KINDS = ["resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "vgg11"]
TORCHVISION_KINDS += ["squeezenet1_1", "mnasnet0_5", "regnet_y_400mf", "googlenet", "convnext_tiny", "swin_t"]


@pytest.mark.parametrize("name", TORCHVISION_KINDS)
def test_build_torchvisions_taps_are_where_the_catalogue_says(name: str):
    facts = architecture(f"torchvision/{name}")
    network = models.build(facts.name, 5).eval()
    taps = Taps(network, [*facts.taps, *([facts.embedding] if facts.embedding else [])])
    with torch.no_grad():
        logits = network(images(1, 3, facts.min_image))
    seen = taps.read()
    sizes = [seen[path].shape[2] for path in facts.taps]
    assert logits.shape == (1, 5) and sizes == sorted(sizes, reverse=True)
    if facts.embedding:
        assert seen[facts.embedding].shape[-1] == facts.embedding_width


@pytest.mark.parametrize("name", QUICK)
def test_build_training_reaches_every_weight(name: str):
    network = models.build(name, 3)
    network(images(4, 3, 32)).logsumexp(1).sum().backward()
    assert [key for key, weight in network.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", QUICK)
def test_build_the_three_parts_make_the_whole(name: str):
    network = models.build(name, 3).eval()
    with torch.no_grad():
        maps = network.stem(images(2, 3, 32))
        for part in network.trunk():
            maps = part(maps)
        assert torch.equal(network.head(maps), network(images(2, 3, 32)))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "convnet4", "vgg8"])
def test_build_digits_of_eight_pixels_fit(name: str):
    assert models.build(name, 10, channels=1).eval()(images(2, 1, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", FIELD)
def test_skeleton_no_activation_works_in_place(name: str):
    relus = [module for module in skeleton(name, 2).modules() if isinstance(module, torch.nn.ReLU)]
    assert not any(relu.inplace for relu in relus)


def test_build_an_unknown_name_is_the_specs_fault():
    with pytest.raises(SpecInvalid, match=r"did you mean .*resnet20"):
        models.build("resnet-20", 10)


@pytest.mark.parametrize(("channels", "works"), [(3, True), (1, False)])
def test_build_torchvision_sees_colour_only(channels: int, works: bool):
    if works:
        assert models.build("torchvision/resnet18", 4, channels)(images(2, 3, 32)).shape == (2, 4)
        return
    with pytest.raises(SpecInvalid, match="3 channels, not 1"):
        models.build("torchvision/resnet18", 4, channels)
