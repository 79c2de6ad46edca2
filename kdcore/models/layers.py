"""The base class and the layers of the networks in this folder.

Every network has the same three parts, so that a scheme can cut it between them:

    logits = head(trunk(stem(images)))

`stem(x)` and `head(x)` are methods, `trunk()` lists the modules between them in order. No ReLU works in place, so
that a tapped activation does not change. Module names are those of published checkpoints.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.nn import functional as F


class Network(nn.Module, ABC):
    """The base class: runs the three parts in order."""

    @abstractmethod
    def stem(self, images_NCHW: Tensor) -> Tensor: ...

    @abstractmethod
    def trunk(self) -> list[nn.Module]: ...

    @abstractmethod
    def head(self, maps_NCHW: Tensor) -> Tensor: ...

    def forward(self, images_NCHW: Tensor) -> Tensor:
        maps = self.stem(images_NCHW)
        for part in self.trunk():
            maps = part(maps)
        return self.head(maps)


def conv(width_in: int, width_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the image size (except for its stride); the batch norm after it has the bias."""
    return nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, groups=groups, bias=False)


def average(maps_NCHW: Tensor) -> Tensor:
    """Return the global average: N × C."""
    return F.adaptive_avg_pool2d(maps_NCHW, 1).flatten(1)


def he_init(network: nn.Module) -> None:
    """Initialise as He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852, eq. 10 with fan out.

    Classifiers keep PyTorch's default, and batch norms keep ones and zeros.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
