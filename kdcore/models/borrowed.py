"""torchvision's and timm's networks by name, untrained.

They compute what their libraries' networks do, from the same weights; only, no ReLU works in place, and the last one of
a residual block has a name: an activation that somebody taps stays what it was. A ReLU saves its output for the
backward pass and a batch norm its input, so that costs no memory in training.
"""

from difflib import get_close_matches
from types import MethodType
from typing import Any

from torch import Tensor, nn

from base.errors import SpecInvalid
from kdcore import vision

WITHOUT_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def from_torchvision(name: str, num_classes: int, channels: int) -> nn.Module:
    """`name` without its prefix. Auxiliary heads are left out: a classifier answers with one tensor of logits."""
    if channels != 3:
        raise SpecInvalid(
            f"torchvision/{name} takes images of 3 channels, not {channels}",
            hint="timm's networks (timm/<name>) take any number of channels",
        )
    options = {"aux_logits": False, "init_weights": True} if name in WITHOUT_AUXILIARY_HEADS else {}
    network: nn.Module = vision.torchvision().models.get_model(name, weights=None, num_classes=num_classes, **options)
    _name_last_relus(network)
    return _none_in_place(network)


def from_timm(name: str, num_classes: int, channels: int) -> nn.Module:
    """`name` without its prefix, with or without a tag of weights (`resnet18.a1_in1k`), which are not fetched."""
    timm = vision.timm()
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise SpecInvalid(f"timm has no model {name!r}", hint=f"did you mean {', '.join(near)}?" if near else None)
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)
    return _none_in_place(network)


def _none_in_place(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return network


def _name_last_relus(network: nn.Module) -> None:
    """torchvision's residual blocks run one ReLU after every layer, so that no path names what the last is given."""
    resnet = vision.torchvision().models.resnet
    for block in network.modules():
        if isinstance(block, (resnet.BasicBlock, resnet.Bottleneck)):
            block.last_relu = nn.ReLU()
            forward = _bottleneck if isinstance(block, resnet.Bottleneck) else _basic_block
            block.forward = MethodType(forward, block)


def _basic_block(block: Any, maps_NCHW: Tensor) -> Tensor:
    maps = block.relu(block.bn1(block.conv1(maps_NCHW)))
    return block.last_relu(block.bn2(block.conv2(maps)) + _shortcut(block, maps_NCHW))


def _bottleneck(block: Any, maps_NCHW: Tensor) -> Tensor:
    maps = block.relu(block.bn1(block.conv1(maps_NCHW)))
    maps = block.relu(block.bn2(block.conv2(maps)))
    return block.last_relu(block.bn3(block.conv3(maps)) + _shortcut(block, maps_NCHW))


def _shortcut(block: Any, maps_NCHW: Tensor) -> Tensor:
    return maps_NCHW if block.downsample is None else block.downsample(maps_NCHW)
