"""An exponential moving average of a network's weights (Polyak & Juditsky 1992)."""

import torch
from torch import Tensor, nn


class Average:
    """Parameters and running statistics: average ← decay · average + (1 - decay) · value. Counters are copied."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        for name, value in network.state_dict().items():
            self._follow(self.state[name], value)

    def _follow(self, average: Tensor, value: Tensor) -> None:
        if average.is_floating_point():
            average.lerp_(value, 1 - self.decay)
        else:
            average.copy_(value)
