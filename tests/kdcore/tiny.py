"""Networks that one can follow by hand, and a batch to show them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdcore import models
from kdcore.classifier import Classifier
from kdcore.lesson import Batch


class ConstantNetwork(nn.Module):
    """Gives every image the same logits, which are its parameters: those of the probabilities given."""

    def __init__(self, probabilities: Sequence[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([math.log(p) for p in probabilities]))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


def constant(*probabilities: float) -> Classifier:
    return Classifier(ConstantNetwork(probabilities), [0.5], [0.5])


def linear(seed: int, classes: int = 3) -> Classifier:
    """Of images 1 x 4 x 4; its one layer is `1`."""
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, classes)), [0.5], [0.25])


def named(architecture: str, seed: int = 0, classes: int = 3) -> Classifier:
    """A network of kdcore's own, for one channel."""
    torch.manual_seed(seed)
    return Classifier(models.build(architecture, classes, 1), [0.5], [0.25])


def batch(labels: Sequence[int], side: int = 4, epoch: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (len(labels), 1, side, side), dtype=torch.uint8, generator=generator)
    return Batch(inputs, torch.tensor(labels), torch.arange(len(labels)), epoch)


def values(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters as they are now."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that are no longer what they were."""
    return {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
