"""What only building a network can tell: whether it takes these images, what its taps give, and all of timm's facts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import SpecInvalid
from kdcore.catalog.architectures import architecture
from kdcore.catalog.facts import ArchitectureFacts, TapFacts
from kdcore.models.networks import build
from kdcore.models.skeleton import skeleton
from kdcore.models.stages import before_relus, readable, stage_ends
from kdcore.taps import Taps


def inspect(name: str, num_classes: int, channels: int, image_size: tuple[int, int]) -> ArchitectureFacts:
    """Facts of a network that has answered two images of this size. Raises SpecInvalid where it cannot."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # What is said of a network depends on its name and the images only.
        network = build(name, num_classes, channels).eval()
        _answer(network, name, num_classes, torch.zeros(2, channels, *image_size))
        facts = architecture(name)
        if facts.source != "timm":
            return facts
        ends = stage_ends(network, (channels, *image_size))
        preactivations, margins = before_relus(network, (channels, *image_size), list(ends))
        stages = {"taps": list(ends), "tap_widths": list(ends.values())}
        before = {"preactivations": preactivations, "margins": margins}
        counts = _counts(network, name, torch.zeros(2, channels, *image_size))
        return facts.model_copy(update={**stages, **before, **counts})


def inspect_taps(
    name: str, num_classes: int, channels: int, image_size: tuple[int, int], paths: Sequence[str]
) -> TapFacts:
    """What taps give for one image of this size. Raises SpecInvalid for one that cannot be read."""
    with torch.random.fork_rng(devices=[]):
        network = build(name, num_classes, channels).eval()
        taps = Taps(network, paths)
        _answer(network, name, num_classes, torch.zeros(2, channels, *image_size))
        return TapFacts(shapes={path: list(activation.shape[1:]) for path, activation in taps.read().items()})


def _answer(network: nn.Module, name: str, num_classes: int, images: Tensor) -> None:
    """Run it, or say why it cannot be."""
    height, width = images.shape[2:]
    try:
        with torch.no_grad():
            logits = network(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SpecInvalid(f"{name} cannot take images of {height} x {width} pixels: {first_line}") from error
    if not isinstance(logits, Tensor) or logits.shape != (len(images), num_classes):
        raise SpecInvalid(f"{name} is no plain classifier: it does not answer N x {num_classes} logits")


def _counts(network: nn.Module, name: str, images: Tensor) -> dict[str, Any]:
    """Embedding and its width, where one module makes the logits; parameters, where it is a linear layer with bias."""
    channels = images.shape[1]
    one, other = skeleton(name, 2, channels), skeleton(name, 3, channels)
    shapes = {key: weight.shape for key, weight in other.named_parameters()}
    changed = [key for key, weight in one.named_parameters() if weight.shape != shapes[key]]
    path = changed[0].rpartition(".")[0] if changed else ""
    if not path or any(key.rpartition(".")[0] != path for key in changed):
        return {}
    embedding = readable(network, images, [f"{path}@in"]).get(f"{path}@in")
    if embedding is None or embedding.dim() < 2 or embedding[0].numel() != embedding.shape[1]:
        return {}
    width = embedding.shape[1]
    found = {"embedding": f"{path}@in", "embedding_width": width}
    if not isinstance(one.get_submodule(path), nn.Linear) or changed != [f"{path}.weight", f"{path}.bias"]:
        return found
    stem = _parameters(skeleton(name, 2, channels + 1)) - _parameters(one)
    body = _parameters(one) - 2 * (width + 1) - channels * stem
    return {**found, "body_parameters": body, "stem_parameters_per_channel": stem}


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
