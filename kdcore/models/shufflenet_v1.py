"""ShuffleNet (three groups) for small images: grouped 1×1 convolutions whose outputs are shuffled between groups.

Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", CVPR 2018,
arXiv:1707.01083, figure 2. The stem is a 1×1 convolution with no pooling. Parameters with 100 classes: 949,258.
"""

from torch import Tensor, cat, nn
from torch.nn import functional as F

from kdcore.models.layers import RELU, Network, average, conv, conv_norm, he_init

GROUPS = 3
STEM = 24


class ShuffleNetV1(Network):
    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = group(STEM, 240, blocks=4)
        self.layer2 = group(240, 480, blocks=8)
        self.layer3 = group(480, 960, blocks=4)
        self.linear = nn.Linear(960, num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return conv_norm(self.conv1, self.bn1, images_NCHW, RELU)

    def trunk(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.linear(average(maps_NCHW))


def group(width_in: int, width_out: int, blocks: int) -> nn.Sequential:
    """Return blocks. The first halves the size and adds channels by concatenation; the others keep both."""
    rest = [Unit(width_out, width_out, stride=1) for _ in range(blocks - 1)]
    return nn.Sequential(Unit(width_in, width_out - width_in, stride=2), *rest)


class Unit(nn.Module):
    """A block: squeeze to a quarter of `width_out`, shuffle, depthwise 3×3, expand to `width_out`; and a shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        inside = width_out // 4
        self.squeeze_groups = 1 if width_in == STEM else GROUPS
        self.conv1 = conv(width_in, inside, 1, groups=self.squeeze_groups)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = conv(inside, inside, 3, stride, groups=inside)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = conv(inside, width_out, 1, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(width_out)
        self.halves = stride == 2
        self.relu = nn.ReLU()

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        maps = conv_norm(self.conv1, self.bn1, maps_NCHW, RELU)
        maps = conv_norm(self.conv2, self.bn2, F.channel_shuffle(maps, self.squeeze_groups), RELU)
        if not self.halves:
            return conv_norm(self.conv3, self.bn3, maps, self.relu, shortcut=maps_NCHW)
        maps = conv_norm(self.conv3, self.bn3, maps)
        return self.relu(cat([maps, F.avg_pool2d(maps_NCHW, 3, stride=2, padding=1)], dim=1))
