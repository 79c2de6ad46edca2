"""A small plain network for small images: three 3×3 convolutions, the second with stride 2.

Widths w, 2w, 2w; `convnet4` has w = 4 and, on one channel and ten classes, 1,030 parameters; `convnet64` 223,690.
It trains in seconds on a CPU, and is so small that distillation helps it on 8×8 digits.
"""

from torch import Tensor, nn

from kdcore.models.layers import InTurn, Network, average, conv, he_init


class ConvNet(Network):
    def __init__(self, width: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.layer1 = layer(channels, width, 1)
        self.layer2 = layer(width, 2 * width, 2)
        self.layer3 = layer(2 * width, 2 * width, 1)
        self.fc = nn.Linear(2 * width, num_classes)
        he_init(self)

    def stem(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW

    def trunk(self) -> list[nn.Module]:
        return [self.layer1, self.layer2, self.layer3]

    def head(self, maps_NCHW: Tensor) -> Tensor:
        return self.fc(average(maps_NCHW))


def layer(width_in: int, width_out: int, stride: int) -> InTurn:
    return InTurn(conv(width_in, width_out, 3, stride), nn.BatchNorm2d(width_out), nn.ReLU())
