"""The ResNets for small images: CIFAR's, and ImageNet's ResNet-18, 34 and 50 behind a stem for small images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385, section 4.2 and table 1.

CIFAR's have three groups of blocks, 16/32/64 wide, and 6n + 2 layers. Where a block changes width or size, the shortcut
is a 1×1 convolution with batch norm (the paper's option B), as in the distillation papers and their checkpoints. The
paper itself used option A on CIFAR, which drops every other pixel and adds zero channels: the `_option_a` names.
ImageNet's have a 3×3 stem without pooling; the stride is in the 3×3 convolution of a bottleneck.

Parameters with 100 classes (option B): resnet8 83,892; resnet14 181,108; resnet20 278,324; resnet32 472,756;
resnet44 667,188; resnet56 861,620; resnet110 1,736,564. Stem 32 and groups 64/128/256: resnet8x4 1,233,540;
resnet32x4 7,433,860. With 10 classes and option A resnet20 has the paper's 0.27 M: 269,722. resnet18_cifar
11,220,132; resnet34_cifar 21,328,292; resnet50_cifar 23,705,252.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.models.layers import RELU, InTurn, Network, average, conv, conv_norm, he_init

EXPANSION = 4


class ResNet(Network):
    """`depth` counts the layers with weights on the longest path; `widths` are those of the stem and the groups."""

    def __init__(
        self,
        depth: int,
        num_classes: int,
        channels: int,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        option_a: bool = False,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        assert rest == 0, "a CIFAR ResNet has 6n + 2 layers"
        self.conv1 = conv(channels, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = basic_group(widths[0], widths[1], blocks, 1, option_a)
        self.layer2 = basic_group(widths[1], widths[2], blocks, 2, option_a)
        self.layer3 = basic_group(widths[2], widths[3], blocks, 2, option_a)
        self.fc = nn.Linear(widths[3], num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return conv_norm(self.conv1, self.bn1, images_NCHW, RELU)

    def trunk(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.fc(average(maps_NCHW))


def basic_group(width_in: int, width_out: int, blocks: int, stride: int, option_a: bool) -> nn.Sequential:
    """Return blocks of one size; the first one changes width and size."""
    rest = [BasicBlock(width_out, width_out, 1, option_a) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(width_in, width_out, stride, option_a), *rest)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut. `relu@in` is the sum before its ReLU."""

    def __init__(self, width_in: int, width_out: int, stride: int, option_a: bool) -> None:
        super().__init__()
        self.conv1 = conv(width_in, width_out, 3, stride)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = conv(width_out, width_out, 3)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.downsample: nn.Module = nn.Identity()
        if option_a and (stride != 1 or width_in != width_out):
            self.downsample = ZeroPad(width_out - width_in, stride)
        elif stride != 1 or width_in != width_out:
            self.downsample = InTurn(conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))
        self.relu = nn.ReLU()

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        maps = conv_norm(self.conv1, self.bn1, maps_NCHW, RELU)
        return conv_norm(self.conv2, self.bn2, maps, self.relu, shortcut=self.downsample(maps_NCHW))


class ZeroPad(nn.Module):
    """Option A: a shortcut with no parameters, its new channels zero, half of them on each side."""

    def __init__(self, more_channels: int, stride: int) -> None:
        super().__init__()
        self.before, self.after = more_channels // 2, more_channels - more_channels // 2
        self.stride = stride

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return F.pad(maps_NCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class FourGroups(Network):
    """Four groups of blocks, 64/128/256/512 wide; a bottleneck's output is four times as wide."""

    def __init__(self, blocks: tuple[int, int, int, int], bottleneck: bool, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        width_in, groups = 64, []
        for number, width, stride in zip(blocks, (64, 128, 256, 512), (1, 2, 2, 2), strict=True):
            if bottleneck:
                groups.append(bottleneck_group(width_in, width, number, stride))
            else:
                groups.append(basic_group(width_in, width, number, stride, option_a=False))
            width_in = width * EXPANSION if bottleneck else width
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.linear = nn.Linear(width_in, num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return conv_norm(self.conv1, self.bn1, images_NCHW, RELU)

    def trunk(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.linear(average(maps_NCHW))


def bottleneck_group(width_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
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
            self.shortcut = InTurn(conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))
        self.relu = nn.ReLU()

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        maps = conv_norm(self.conv1, self.bn1, maps_NCHW, RELU)
        maps = conv_norm(self.conv2, self.bn2, maps, RELU)
        return conv_norm(self.conv3, self.bn3, maps, self.relu, shortcut=self.shortcut(maps_NCHW))
