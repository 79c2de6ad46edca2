"""The catalogue's ends of stages, compared with every network.

Shapes are compared with networks without memory; the places before a ReLU and their batch norms with real networks.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore import models
from kdcore.catalog.architectures import ARCHITECTURES, FIELD, architecture
from kdcore.models.networks import skeleton
from kdcore.models.taps import Taps

KINDS = ["alexnet", "densenet121", "mobilenet_v2", "mnasnet0_5", "regnet_y_400mf", "resnet18", "swin_t", "vgg11_bn"]
QUICK = [*FIELD, *(f"torchvision/{kind}" for kind in KINDS)]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name not in QUICK]


def images(name: str, device: str = "cpu") -> Tensor:
    facts = architecture(name)
    size = facts.max_image or max(facts.min_image, 32)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_taps_every_tap_works_in_training_and_is_as_wide_as_the_catalogue_says(name: str):
    """Read in training, so that an in-place operation behind a tap would be seen."""
    facts = architecture(name)
    network = skeleton(name, 5).to("meta").train()
    embedding = [facts.embedding] if facts.embedding else []
    taps = Taps(network, [*facts.taps, *facts.preactivations, *embedding])
    network(images(name, "meta"))
    seen = taps.read()
    sizes = [seen[path].shape[2:] for path in facts.taps]
    assert all(seen[path].dim() == 4 for path in facts.taps) and sizes == sorted(sizes, reverse=True)
    assert [seen[path].shape[1] for path in facts.taps] == facts.tap_widths
    assert [seen[path].shape[1] for path in facts.preactivations] in ([], facts.tap_widths)
    norms = [network.get_submodule(path) for path in facts.margins]
    assert [norm.num_features for norm in norms if isinstance(norm, nn.BatchNorm2d)] in ([], facts.tap_widths)
    assert all(seen[path].shape == (2, facts.embedding_width) for path in embedding)


@pytest.mark.parametrize("kind", [*KINDS, "efficientnet_b0", "googlenet", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_taps_gradients_flow_through_the_taps_of_torchvision(kind: str):
    facts = architecture(f"torchvision/{kind}")
    network = models.build(facts.name, 5).train()
    taps = Taps(network, [*facts.taps, *facts.preactivations])
    logits = network(images(facts.name))
    (logits.sum() + sum(tap.square().sum() for tap in taps.read().values())).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


REAL = ["resnet8", "resnet20", "resnet8_option_a", "resnet50_cifar", "wrn_16_1", "vgg8", "vgg13", "mobilenetv2_x0_5"]
REAL += ["shufflenetv1", "convnet4", *(f"torchvision/{kind}" for kind in ("resnet18", "resnet50", "vgg11_bn"))]
REAL += ["torchvision/alexnet", "torchvision/mobilenet_v2", "torchvision/mnasnet0_5"]


@pytest.mark.parametrize("name", REAL)
def test_taps_the_preactivations_are_what_stands_before_the_relu(name: str):
    facts = architecture(name)
    network = models.build(name, 5).eval()
    taps = Taps(network, [*facts.taps, *facts.preactivations])
    with torch.no_grad():
        network(images(name))
    seen = taps.read()
    for tap, preactivation in zip(facts.taps, facts.preactivations, strict=True):
        before, after = seen[preactivation], seen[tap]
        assert before.min() < 0
        match facts.family:
            case "wrn":
                after = network.get_submodule(preactivation)(after)
            case "mobilenetv2" | "mobilenet_v2" | "mnasnet":
                pass
            case "alexnet":
                before = F.max_pool2d(F.relu(before), 3, 2)
            case "vgg11_bn":
                before = F.max_pool2d(F.relu(before), 2)
            case _:
                before = F.relu(before)
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", [name for name in REAL if architecture(name).margins])
def test_taps_the_margins_batch_norms_feed_the_preactivations(name: str):
    """One more in a batch norm's shift is one more in what it feeds, and in nothing before it."""
    facts = architecture(name)
    network = models.build(name, 5).eval()
    taps = Taps(network, facts.preactivations)

    def seen() -> list[Tensor]:
        network(images(name))
        return list(taps.read().values())

    with torch.no_grad():
        for stage, margin in enumerate(facts.margins):
            before = seen()
            network.get_submodule(margin).bias += 1
            after = seen()
            torch.testing.assert_close(after[stage], before[stage] + 1)
            for earlier in range(stage):
                assert torch.equal(after[earlier], before[earlier])
