"""ShuffleNetV2 (1×) for small images: half of the channels pass a unit unchanged, then the halves are shuffled.

Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV 2018, arXiv:1807.11164,
figure 3. The stem is a 1×1 convolution with no pooling. Parameters with 100 classes: 1,355,528.
"""

from torch import Tensor, cat, nn
from torch.nn import functional as F

from kdcore.models.layers import RELU, Network, average, conv, conv_norm, he_init

STEM = 24
EMBEDDING = 1024


class ShuffleNetV2(Network):
    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, STEM, 1)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = group(STEM, 116, units=3)
        self.layer2 = group(116, 232, units=7)
        self.layer3 = group(232, 464, units=3)
        self.conv2 = conv(464, EMBEDDING, 1)
        self.bn2 = nn.BatchNorm2d(EMBEDDING)
        self.linear = nn.Linear(EMBEDDING, num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return conv_norm(self.conv1, self.bn1, images_NCHW, RELU)

    def trunk(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.linear(average(conv_norm(self.conv2, self.bn2, maps_NCHW, RELU)))


def group(width_in: int, width_out: int, units: int) -> nn.Sequential:
    """Return one unit that halves the size, then `units` that keep it."""
    return nn.Sequential(DownUnit(width_in, width_out), *(Unit(width_out) for _ in range(units)))


class Unit(nn.Module):
    """A unit that convolves half of its channels and passes the other half unchanged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        passing, maps = maps_NCHW.chunk(2, dim=1)
        maps = conv_norm(self.conv1, self.bn1, maps, RELU)
        maps = conv_norm(self.conv2, self.bn2, maps)
        maps = conv_norm(self.conv3, self.bn3, maps, RELU)
        return F.channel_shuffle(cat([passing, maps], dim=1), 2)


class DownUnit(nn.Module):
    """A unit whose two branches take all channels and halve the size; together they have the new width."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        half = width_out // 2
        self.conv1 = conv(width_in, width_in, 3, 2, groups=width_in)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = conv(width_in, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(width_in, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, 2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        left = conv_norm(self.conv2, self.bn2, conv_norm(self.conv1, self.bn1, maps_NCHW), RELU)
        right = conv_norm(self.conv3, self.bn3, maps_NCHW, RELU)
        right = conv_norm(self.conv4, self.bn4, right)
        right = conv_norm(self.conv5, self.bn5, right, RELU)
        return F.channel_shuffle(cat([left, right], dim=1), 2)
