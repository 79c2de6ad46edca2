"""Wide ResNets, WRN-d-k: pre-activation blocks, three groups 16k/32k/64k wide, 6n + 4 layers deep, no dropout.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.

Parameters with 100 classes: wrn_16_1 180,916; wrn_16_2 703,284; wrn_40_1 569,780; wrn_40_2 2,255,156.
A group ends in a sum without activation; the next group's first batch norm comes before the ReLU.
"""

from torch import Tensor, nn

from kdcore.models.layers import RELU, Network, average, conv, conv_norm, he_init, norm_act


class WideResNet(Network):
    def __init__(self, depth: int, widen: int, num_classes: int, channels: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        assert rest == 0, "a wide ResNet has 6n + 4 layers"
        self.conv1 = conv(channels, 16, 3)
        self.block1 = Group(16, 16 * widen, blocks, 1)
        self.block2 = Group(16 * widen, 32 * widen, blocks, 2)
        self.block3 = Group(32 * widen, 64 * widen, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return self.conv1(images_NCHW)

    def trunk(self) -> list[nn.Module]:
        return [self.block1, self.block2, self.block3]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.fc(average(norm_act(self.bn1, maps_NCHW, RELU)))


class Group(nn.Module):
    """A group of blocks. Published checkpoints call the list of blocks `layer`."""

    def __init__(self, width_in: int, width_out: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = [PreActivationBlock(width_out, width_out, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(PreActivationBlock(width_in, width_out, stride), *rest)

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return self.layer(maps_NCHW)


class PreActivationBlock(nn.Module):
    """A block with batch norm and ReLU before each convolution. A block that widens also normalises its shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = conv(width_in, width_out, 3, stride)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.conv2 = conv(width_out, width_out, 3)
        self.convShortcut = conv(width_in, width_out, 1, stride) if width_in != width_out else None

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        active = norm_act(self.bn1, maps_NCHW, RELU)
        shortcut = maps_NCHW if self.convShortcut is None else conv_norm(self.convShortcut, None, active)
        maps = conv_norm(self.conv1, self.bn2, active, RELU)
        return conv_norm(self.conv2, None, maps, shortcut=shortcut)
