"""MobileNetV2 at half width for small images: inverted residuals with linear bottlenecks.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381, table 2.

As in the distillation papers on CIFAR: expansion 6, the second group without its stride, and an expansion layer even
where the factor is 1. Parameters with 100 classes: 812,836.
"""

from torch import Tensor, nn

from kdcore.models.layers import InTurn, Network, average, conv, he_init, with_shortcut

GROUPS = (
    # expansion, width before halving, blocks, stride
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
EMBEDDING = 1280


class MobileNetV2(Network):
    """`blocks.1`, `.2`, `.4` and `.6` end a resolution or the trunk; their maps are linear, before any activation."""

    def __init__(self, num_classes: int, channels: int, width: float = 0.5) -> None:
        super().__init__()
        width_in = int(32 * width)
        self.conv1 = InTurn(conv(channels, width_in, 3, 2), nn.BatchNorm2d(width_in), nn.ReLU())
        self.blocks = nn.ModuleList()
        for expansion, full_width, blocks, stride in GROUPS:
            width_out = int(full_width * width)
            rest = [InvertedResidual(width_out, width_out, 1, expansion) for _ in range(blocks - 1)]
            self.blocks.append(nn.Sequential(InvertedResidual(width_in, width_out, stride, expansion), *rest))
            width_in = width_out
        self.conv2 = InTurn(conv(width_in, EMBEDDING, 1), nn.BatchNorm2d(EMBEDDING), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(EMBEDDING, num_classes))
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return self.conv1(images_NCHW)

    def trunk(self) -> list[nn.Module]:
        return list(self.blocks)

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.classifier(average(self.conv2(maps_NCHW)))


class InvertedResidual(nn.Module):
    """A block that is wide inside and narrow at both ends; a shortcut adds the input if both ends have one shape."""

    def __init__(self, width_in: int, width_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = width_in * expansion
        self.conv = InTurn(
            conv(width_in, inside, 1),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
            conv(inside, inside, 3, stride, groups=inside),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
            conv(inside, width_out, 1),
            nn.BatchNorm2d(width_out),
        )
        self.has_shortcut = stride == 1 and width_in == width_out

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        if self.has_shortcut:
            return with_shortcut(self.conv, maps_NCHW, shortcut=maps_NCHW)
        return self.conv(maps_NCHW)
