"""A network with the normalisation that belongs to it: pixels in, a View out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kdcore.lesson import View
from kdcore.taps import Taps


class Classifier(nn.Module):
    """Normalises pixels in 0..255 by `mean` and `std` (per channel, of pixels in 0..1) and runs the network.

    The network computes in bfloat16 where `bf16` says so; what it hands over is at least float32, so that losses
    need no casts.
    """

    network: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        taps: Sequence[str] = (),
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent in torch's stub
        self.bf16 = bf16
        self._taps = Taps(network, taps)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> View:
        normalised = (pixels.float() / 255 - self.mean) / self.std
        with self._autocast(pixels.device.type):
            logits = self.network(normalised.contiguous(memory_format=torch.channels_last))
        return View(_lifted(logits), {path: _lifted(tap) for path, tap in self._taps.read().items()})

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        return torch.autocast(device_type, dtype=torch.bfloat16, enabled=self.bf16)


def _lifted(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
