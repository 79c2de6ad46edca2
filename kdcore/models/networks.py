"""Networks by name: the field's own, which torchvision and timm lack, and both libraries' under their prefix."""

from collections.abc import Callable

from torch import nn

from base.errors import SpecInvalid
from kdcore.catalog.architectures import UnknownName, architecture
from kdcore.models.borrowed import from_timm, from_torchvision
from kdcore.models.convnet import ConvNet
from kdcore.models.mobilenet_v2 import MobileNetV2
from kdcore.models.resnet import ResNet
from kdcore.models.resnet50_cifar import ResNet50
from kdcore.models.shufflenet_v1 import ShuffleNetV1
from kdcore.models.shufflenet_v2 import ShuffleNetV2
from kdcore.models.vgg import VGG
from kdcore.models.wrn import WideResNet

X4 = (32, 64, 128, 256)

NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": lambda classes, channels: ResNet(8, classes, channels),
    "resnet14": lambda classes, channels: ResNet(14, classes, channels),
    "resnet20": lambda classes, channels: ResNet(20, classes, channels),
    "resnet32": lambda classes, channels: ResNet(32, classes, channels),
    "resnet44": lambda classes, channels: ResNet(44, classes, channels),
    "resnet56": lambda classes, channels: ResNet(56, classes, channels),
    "resnet110": lambda classes, channels: ResNet(110, classes, channels),
    "resnet8x4": lambda classes, channels: ResNet(8, classes, channels, X4),
    "resnet32x4": lambda classes, channels: ResNet(32, classes, channels, X4),
    "resnet8_option_a": lambda classes, channels: ResNet(8, classes, channels, option_a=True),
    "resnet14_option_a": lambda classes, channels: ResNet(14, classes, channels, option_a=True),
    "resnet20_option_a": lambda classes, channels: ResNet(20, classes, channels, option_a=True),
    "resnet32_option_a": lambda classes, channels: ResNet(32, classes, channels, option_a=True),
    "resnet44_option_a": lambda classes, channels: ResNet(44, classes, channels, option_a=True),
    "resnet56_option_a": lambda classes, channels: ResNet(56, classes, channels, option_a=True),
    "resnet110_option_a": lambda classes, channels: ResNet(110, classes, channels, option_a=True),
    "resnet50_cifar": ResNet50,
    "wrn_16_1": lambda classes, channels: WideResNet(16, 1, classes, channels),
    "wrn_16_2": lambda classes, channels: WideResNet(16, 2, classes, channels),
    "wrn_40_1": lambda classes, channels: WideResNet(40, 1, classes, channels),
    "wrn_40_2": lambda classes, channels: WideResNet(40, 2, classes, channels),
    "vgg8": lambda classes, channels: VGG(8, classes, channels),
    "vgg11": lambda classes, channels: VGG(11, classes, channels),
    "vgg13": lambda classes, channels: VGG(13, classes, channels),
    "vgg16": lambda classes, channels: VGG(16, classes, channels),
    "vgg19": lambda classes, channels: VGG(19, classes, channels),
    "mobilenetv2_x0_5": MobileNetV2,
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "convnet4": lambda classes, channels: ConvNet(4, classes, channels),
    "convnet8": lambda classes, channels: ConvNet(8, classes, channels),
    "convnet16": lambda classes, channels: ConvNet(16, classes, channels),
    "convnet32": lambda classes, channels: ConvNet(32, classes, channels),
    "convnet64": lambda classes, channels: ConvNet(64, classes, channels),
}


def build(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """An untrained network: float NCHW images in, N × `num_classes` logits out.

    Raises SpecInvalid for a name that nobody knows, and for images that the network cannot take.
    """
    try:
        facts = architecture(name)
    except UnknownName as unknown:
        raise SpecInvalid(str(unknown)) from unknown
    bare_name = name.partition("/")[2]
    if facts.source == "torchvision":
        return from_torchvision(bare_name, num_classes, channels)
    if facts.source == "timm":
        return from_timm(bare_name, num_classes, channels)
    return NETWORKS[name](num_classes, channels)
