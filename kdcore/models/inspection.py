"""What only building a network can tell: whether it takes these images, and timm's counts."""

import torch
from torch import nn

from kdcore.catalog.architectures import architecture
from kdcore.catalog.facts import ArchitectureFacts
from kdcore.errors import SpecInvalid
from kdcore.models.networks import build
from kdcore.models.skeleton import skeleton


def inspect(name: str, num_classes: int, channels: int, image_size: tuple[int, int]) -> ArchitectureFacts:
    """Facts of a network that has answered two images of this size. Raises SpecInvalid where it cannot."""
    network = build(name, num_classes, channels).eval()
    height, width = image_size
    try:
        with torch.no_grad():
            logits = network(torch.zeros(2, channels, height, width))
    except (RuntimeError, ValueError, AssertionError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecInvalid(f"{name} cannot take images of {height} x {width} pixels: {first_line}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        raise SpecInvalid(f"{name} is no plain classifier: it does not answer N x {num_classes} logits")
    facts = architecture(name)
    return facts if facts.source != "timm" else facts.model_copy(update=_counts(name, channels))


def _counts(name: str, channels: int) -> dict[str, str | int | None]:
    """Embedding and parameters, where the classifier is one linear layer with a bias; else nothing."""
    one, other = skeleton(name, 2, channels), skeleton(name, 3, channels)
    shapes = {key: weight.shape for key, weight in other.named_parameters()}
    changed = [key for key, weight in one.named_parameters() if weight.shape != shapes[key]]
    path = changed[0].rpartition(".")[0] if changed else ""
    classifier = one.get_submodule(path)
    if not isinstance(classifier, nn.Linear) or changed != [f"{path}.weight", f"{path}.bias"]:
        return {}
    more_channels = skeleton(name, 2, channels + 1)
    stem = _parameters(more_channels) - _parameters(one)
    width = classifier.in_features
    body = _parameters(one) - 2 * (width + 1) - channels * stem
    return {
        "embedding": f"{path}@in",
        "embedding_width": width,
        "body_parameters": body,
        "stem_parameters_per_channel": stem,
    }


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
