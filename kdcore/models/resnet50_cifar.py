"""ResNet-50 for small images: ImageNet's four stages of bottlenecks behind a 3×3 stem with no pooling.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, table 1; the stride stands on
the 3×3 convolution. Parameters with 100 classes: 23,705,252.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.models.parts import Network, average, conv, he_init

EXPANSION = 4


class ResNet50(Network):
    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64, blocks=3, stride=1)
        self.layer2 = stage(256, 128, blocks=4, stride=2)
        self.layer3 = stage(512, 256, blocks=6, stride=2)
        self.layer4 = stage(1024, 512, blocks=3, stride=2)
        self.linear = nn.Linear(2048, num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(images_NCHW)))

    def trunk(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.linear(average(maps_NCHW))


def stage(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    rest = [Bottleneck(width * EXPANSION, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(width_in, width, stride), *rest)


class Bottleneck(nn.Module):
    """1×1 down, 3×3, 1×1 up beside a shortcut. `relu@in` is the sum before its ReLU."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        width_out = width * EXPANSION
        self.conv1 = conv(width_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, width_out, 1)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))
        self.relu = nn.ReLU()

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        maps = F.relu(self.bn1(self.conv1(maps_NCHW)))
        maps = F.relu(self.bn2(self.conv2(maps)))
        return self.relu(self.bn3(self.conv3(maps)) + self.shortcut(maps_NCHW))
