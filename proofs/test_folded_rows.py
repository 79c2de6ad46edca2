"""A folded teacher gives an image the same bits in any place of a batch, beside any others, with 1, 2, 3 and 5 threads.

The cache of teachers' outputs relies on it: it computes missing rows in pieces of one size. All networks by name but
those whose layers another one has, and kinds of torchvision's, in both precisions and with our own convolutions, at
their logits and at all taps of the catalogue.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdcore import kernels, models
from kdcore.catalog.architectures import FIELD, architecture
from kdcore.models.layers import OWN, can_fold, fold, ran_as
from kdcore.models.taps import Taps

SIDE, ROWS = 32, 16
DEEPER = [f"resnet{depth}{kind}" for depth in (14, 32, 44, 56, 110) for kind in ("", "_option_a")]
DEEPER += ["wrn_16_1", "wrn_16_2", "vgg11", "vgg13", "vgg16"]
"""Depths of a network that is there in another depth, with convolutions and maps of the same shapes."""
TORCHVISION = ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vgg11_bn"]
TORCHVISION += ["densenet121", "efficientnet_b0", "mnasnet0_5", "regnet_y_400mf", "googlenet", "squeezenet1_1"]
NAMES = [*(name for name in FIELD if name not in DEEPER), *(f"torchvision/{name}" for name in TORCHVISION)]


@pytest.fixture(params=["bf16", "fp32", "own bf16", "own fp32"])
def precision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The precision of networks; "own": with our own convolutions."""
    if request.param.startswith("own"):
        folder: Path = tmp_path_factory.getbasetemp() / "kernels"
        support = kernels.enable(folder)
        if (torch.bfloat16 if request.param == "own bf16" else torch.float32) not in support.convolutions:
            pytest.skip(f"no convolutions here: {support.note}")
    elif request.param == "bf16" and not can_fold(True):
        pytest.skip("oneDNN has no bfloat16 convolutions here")
    yield request.param
    kernels.disable()


@pytest.mark.parametrize("name", NAMES)
def test_fold_a_row_has_the_same_bits_in_any_place_beside_any_others(name: str, precision: str):
    bf16 = precision.endswith("bf16")
    torch.manual_seed(0)
    network, facts = models.build(name, 10, 3).to(memory_format=torch.channels_last), architecture(name)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    fold(network.eval().requires_grad_(False), bf16)
    rows = torch.randn(ROWS, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    orders = [torch.randperm(ROWS), torch.randint(ROWS, (1,)).repeat(ROWS)]
    threads = torch.get_num_threads()
    for paths in ([*facts.taps, *([facts.embedding] if facts.embedding else [])], facts.preactivations):
        taps = Taps(network, paths)

        def seen(count: int, images: Tensor, taps: Taps = taps) -> dict[str, Tensor]:
            torch.set_num_threads(count)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return {"logits": network(images), **taps.read()}

        one = seen(1, rows)
        if precision.startswith("own") and not ran_as(OWN, network.modules()):
            taps.close()
            pytest.skip("none of its layers is for our own convolutions: as without them")
        for count, order in ((1, orders[0]), (1, orders[1]), (2, orders[0]), (3, orders[1]), (5, orders[0])):
            other = seen(count, rows[order])
            assert [path for path in one if not torch.equal(one[path][order], other[path])] == []
        taps.close()
    torch.set_num_threads(threads)
