"""torchvision's and timm's networks by name, untrained."""

from difflib import get_close_matches

from torch import nn

from kdcore import vision
from kdcore.errors import SpecInvalid

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
    return network


def from_timm(name: str, num_classes: int, channels: int) -> nn.Module:
    """`name` without its prefix, with or without a tag of weights (`resnet18.a1_in1k`), which are not fetched."""
    timm = vision.timm()
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise SpecInvalid(f"timm has no model {name!r}", hint=f"did you mean {', '.join(near)}?" if near else None)
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)
    return network
