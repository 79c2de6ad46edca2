"""The layers of `kdcore/models` in plain PyTorch, as `student.py` has them: each computes what the one of the same name
in `kdcore/models/layers.py` computes in its eager form. No import of the project: the text of these definitions is
copied into files that need torch alone.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

RELU = nn.ReLU()
InTurn = nn.Sequential


class Network(nn.Module):
    """Runs its three parts in order."""

    stem: Callable[[Tensor], Tensor]
    trunk: Callable[[], list[nn.Module]]
    head: Callable[[Tensor], Tensor]

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for part in self.trunk():
            maps = part(maps)
        return self.head(maps)


def conv_norm(
    conv: nn.Module,
    norm: nn.Module | None,
    maps: Tensor,
    activation: nn.Module | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:
    """Return activation(norm(conv(maps)) + shortcut); what is None is left out."""
    maps = conv(maps)
    if norm is not None:
        return norm_act(norm, maps, activation, shortcut)
    maps = maps if shortcut is None else maps + shortcut
    return maps if activation is None else activation(maps)


def norm_act(
    norm: nn.Module, maps: Tensor, activation: nn.Module | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """Return activation(norm(maps) + shortcut); what is None is left out."""
    maps = norm(maps)
    maps = maps if shortcut is None else maps + shortcut
    return maps if activation is None else activation(maps)


def with_shortcut(module: nn.Module, maps: Tensor, shortcut: Tensor) -> Tensor:
    """Return module(maps) + shortcut."""
    added: Tensor = module(maps) + shortcut
    return added


class Ensemble(nn.ModuleList):
    """Several networks as one: the log of the mean of their probabilities."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__(networks)

    def forward(self, images: Tensor) -> Tensor:
        logs = torch.stack([network(images).log_softmax(1) for network in self])
        return logs.logsumexp(0) - torch.tensor(float(len(self))).log()
