"""A network with the normalisation that belongs to it: pixels in, a View out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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

    def like(self, network: nn.Module) -> Classifier:
        """Another network on the same device, with this one's normalisation and precision."""
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        return Classifier(network, mean, std, bf16=self.bf16).to(self.mean.device)

    def watch(self, paths: Sequence[str]) -> None:
        """Tap these places, and no others, from now on."""
        self._taps.close()
        self._taps = Taps(self.network, dict.fromkeys(paths))

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> View:
        """A view; with `labels` it holds the input gradient, which can be differentiated where gradients are on. Where
        a label is unknown, the gradient is that of the view's own answer."""
        images = ((pixels.float() / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if labels is None:
            return self._precisely(images)
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            view = self._precisely(images.requires_grad_())
            # The sum: a mean would scale each image's gradient by the size of its batch.
            loss = cross_entropy(view.logits, answered(labels, view.logits), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, images, create_graph=learning)
        return View(view.logits, view.taps, gradient if learning else gradient.detach())

    def look(self, images: Tensor) -> View:
        """A view of images that are normalised already, in whatever precision stands around the call."""
        logits = self.network(images)
        return View(_lifted(logits), {path: _lifted(tap) for path, tap in self._taps.read().items()})

    def _precisely(self, images: Tensor) -> View:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            return self.look(images)


def answered(labels: Tensor, logits: Tensor) -> Tensor:
    """The labels; where one is unknown (-1), the class that these logits find most likely. Mixed labels are known."""
    return labels if labels.is_floating_point() else torch.where(labels < 0, logits.argmax(1), labels)


def _lifted(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
