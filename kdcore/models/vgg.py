"""VGG for small images: five groups of 3×3 convolutions with batch norm, one linear classifier.

Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015, arXiv:1409.1556,
table 1. vgg8, with one convolution in each group, comes from the distillation papers.

Parameters with 100 classes: vgg8 3,965,028; vgg11 9,277,284; vgg13 9,462,180; vgg16 14,774,436; vgg19 20,086,692.
The fourth pooling acts only on images of 64 pixels and more: those of 32 keep 4 × 4 places for the last group.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.models.layers import InTurn, Network, average, he_init

GROUPS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((64,), (128,), (256,), (512,), (512,)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGG(Network):
    """Each `block` ends in its last ReLU; pooling follows between blocks."""

    def __init__(self, depth: int, num_classes: int, channels: int) -> None:
        super().__init__()
        widths = GROUPS[depth]
        self.block0 = group(channels, widths[0])
        self.block1 = group(widths[0][-1], widths[1])
        self.block2 = group(widths[1][-1], widths[2])
        self.block3 = group(widths[2][-1], widths[3])
        self.block4 = group(widths[3][-1], widths[4])
        self.pool = nn.MaxPool2d(2)
        self.pool_if_large = PoolIfLarge()
        self.classifier = nn.Linear(widths[4][-1], num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW

    def trunk(self) -> list[nn.Module]:
        return [
            *(self.block0, self.pool),
            *(self.block1, self.pool),
            *(self.block2, self.pool),
            *(self.block3, self.pool_if_large),
            self.block4,
        ]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.classifier(average(maps_NCHW))


def group(width_in: int, widths: tuple[int, ...]) -> InTurn:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        width_in = width
    return InTurn(*layers)


class PoolIfLarge(nn.Module):
    """A pooling that acts only on maps of eight pixels and more: those of an image of 64 after three poolings."""

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return F.max_pool2d(maps_NCHW, 2) if maps_NCHW.shape[2] >= 8 else maps_NCHW
