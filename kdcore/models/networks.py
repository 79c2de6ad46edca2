"""Untrained networks by name: those of this folder, and those of torchvision and timm under their prefix.

The libraries' networks compute their usual outputs from their usual weights. Two things change for taps: no ReLU
works in place, and the last ReLU of a torchvision residual block has a name of its own. This costs no memory in
training: a ReLU saves its output for the backward pass and a batch norm its input.
"""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from base.errors import SpecInvalid
from kdcore import vision
from kdcore.catalog.architectures import HiddenLayer, UnknownName, architecture, hidden_layers
from kdcore.models.convnet import ConvNet
from kdcore.models.layers import RELU, conv_norm, join_sequences, norm_act, with_shortcut
from kdcore.models.mobilenet_v2 import MobileNetV2
from kdcore.models.resnet import FourGroups, ResNet
from kdcore.models.shufflenet_v1 import ShuffleNetV1
from kdcore.models.shufflenet_v2 import ShuffleNetV2
from kdcore.models.vgg import VGG
from kdcore.models.wrn import WideResNet

WITHOUT_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_RANDOM = (torch.Tensor.normal_, torch.Tensor.uniform_)
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
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
    "resnet18_cifar": lambda classes, channels: FourGroups((2, 2, 2, 2), False, classes, channels),
    "resnet34_cifar": lambda classes, channels: FourGroups((3, 4, 6, 3), False, classes, channels),
    "resnet50_cifar": lambda classes, channels: FourGroups((3, 4, 6, 3), True, classes, channels),
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
    """Return an untrained network: float NCHW images in, N × `num_classes` logits out.

    Raises SpecInvalid for an unknown name, and for images that the network cannot take.
    """
    try:
        facts = architecture(name)
    except UnknownName as unknown:
        raise SpecInvalid(str(unknown)) from unknown
    bare, layers = hidden_layers(name)
    if layers:
        network = build(bare, num_classes, channels)
        _deepen_classifier(network, bare, layers)
        return network
    bare_name = name.partition("/")[2]
    if facts.source == "torchvision":
        return _from_torchvision(bare_name, num_classes, channels)
    if facts.source == "timm":
        return _from_timm(bare_name, num_classes, channels)
    return NETWORKS[name](num_classes, channels)


def skeleton(name: str, num_classes: int, channels: int = 3) -> nn.Module:
    """Return the network of `build` without memory and initialisation: its tensors have names and shapes only."""
    try:
        with _WithoutMemory():
            return build(name, num_classes, channels)
    except (NotImplementedError, RuntimeError):  # The constructor computed with a tensor on the meta device.
        return build(name, num_classes, channels)


def classifier_of(network: nn.Module, name: str) -> str:
    """Return the module path of a network's classifier, a linear layer. Raises SpecInvalid if it has no such one."""
    embedding = architecture(name).embedding
    path = embedding.removesuffix("@in") if embedding else getattr(network, "pretrained_cfg", {}).get("classifier")
    try:
        if isinstance(path, str) and isinstance(network.get_submodule(path), nn.Linear):
            return path
    except AttributeError:
        pass
    raise SpecInvalid(f"{name} has no single linear classifier, so it can get no hidden layers before it")


def _deepen_classifier(network: nn.Module, name: str, layers: Sequence[HiddenLayer]) -> None:
    """Put hidden layers before a network's classifier: in its place is a sequence, whose last module it is."""
    path = classifier_of(network, name)
    classifier = network.get_submodule(path)
    assert isinstance(classifier, nn.Linear)
    sequence: list[nn.Module] = []
    width = classifier.in_features
    for layer in layers:
        sequence.append(nn.Linear(width, layer.units))
        if layer.batch_norm:
            sequence.append(nn.BatchNorm1d(layer.units))
        if layer.activation != "linear":
            sequence.append(_ACTIVATIONS[layer.activation]())
        width = layer.units
    network.set_submodule(path, nn.Sequential(*sequence, nn.Linear(width, classifier.out_features)))


class _WithoutMemory(TorchFunctionMode):
    """A mode in which `torch.empty`, used by layers, allocates on the meta device, and no random numbers are drawn.

    `torch.device("meta")` would suffice for most networks, but not for those that compute their widths with tensors,
    and random numbers on it import PyTorch's compiler, which takes seconds.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if function is torch.empty:
            options["device"] = "meta"
        if function in _RANDOM or getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else options["tensor"]
        return function(*args, **options)


def _from_torchvision(name: str, num_classes: int, channels: int) -> nn.Module:
    """Build a network of torchvision without auxiliary heads: a classifier returns one tensor of logits."""
    if channels != 3:
        raise SpecInvalid(
            f"torchvision/{name} takes images of 3 channels, not {channels}",
            hint="timm's networks (timm/<name>) take any number of channels",
        )
    options = {"aux_logits": False, "init_weights": True} if name in WITHOUT_AUXILIARY_HEADS else {}
    network: nn.Module = vision.torchvision().models.get_model(name, weights=None, num_classes=num_classes, **options)
    _through_layers(network)
    return _none_in_place(network)


def _from_timm(name: str, num_classes: int, channels: int) -> nn.Module:
    """Build a network of timm. The name may have a tag of weights (`resnet18.a1_in1k`); they are not downloaded."""
    timm = vision.timm()
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise SpecInvalid(f"timm has no model {name!r}", hint=f"did you mean {', '.join(near)}?" if near else None)
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)
    except RuntimeError as error:
        bare, _, tag = name.partition(".")
        if not tag or "pretrained tag" not in str(error):
            raise
        text = f"timm publishes no weights with the tag {tag!r} of {bare}"
        raise SpecInvalid(text, hint=f"timm/{bare} is the network without them") from None
    join_sequences(network)
    return _none_in_place(network)


def _none_in_place(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return network


def _through_layers(network: nn.Module) -> None:
    """Let a network of torchvision compute its batch norms as ours do, by the functions of `layers`.

    The last ReLU of a residual block gets a name of its own: these blocks call one ReLU module after every layer.
    """
    join_sequences(network)
    for module in network.modules():
        if forward := _FORWARDS.get(f"{type(module).__module__}.{type(module).__qualname__}"):
            module.forward = MethodType(forward, module)
        if forward in (_basic_block, _bottleneck):
            module.last_relu = nn.ReLU()


def _resnet(network: Any, images_NCHW: Tensor) -> Tensor:
    maps = network.maxpool(conv_norm(network.conv1, network.bn1, images_NCHW, network.relu))
    for group in (network.layer1, network.layer2, network.layer3, network.layer4):
        maps = group(maps)
    return network.fc(network.avgpool(maps).flatten(1))


def _basic_block(block: Any, maps_NCHW: Tensor) -> Tensor:
    maps = conv_norm(block.conv1, block.bn1, maps_NCHW, block.relu)
    return conv_norm(block.conv2, block.bn2, maps, block.last_relu, shortcut=_shortcut(block, maps_NCHW))


def _bottleneck(block: Any, maps_NCHW: Tensor) -> Tensor:
    maps = conv_norm(block.conv1, block.bn1, maps_NCHW, block.relu)
    maps = conv_norm(block.conv2, block.bn2, maps, block.relu)
    return conv_norm(block.conv3, block.bn3, maps, block.last_relu, shortcut=_shortcut(block, maps_NCHW))


def _shortcut(block: Any, maps_NCHW: Tensor) -> Tensor:
    return maps_NCHW if block.downsample is None else block.downsample(maps_NCHW)


def _dense_layer(layer: Any, maps: Tensor | list[Tensor]) -> Tensor:
    joined = maps if isinstance(maps, Tensor) else torch.cat(maps, 1)
    inner = conv_norm(layer.conv1, layer.norm2, norm_act(layer.norm1, joined, layer.relu1), layer.relu2)
    new = conv_norm(layer.conv2, None, inner)
    return nn.functional.dropout(new, layer.drop_rate, layer.training) if layer.drop_rate > 0 else new


def _basic_conv(layer: Any, maps_NCHW: Tensor) -> Tensor:
    return conv_norm(layer.conv, layer.bn, maps_NCHW, RELU)


def _inverted_residual(adds: str, layers: str) -> Callable[[Any, Tensor], Tensor]:
    """Return the forward pass of a block whose attributes `adds` and `layers` say whether it has a shortcut, and what
    it is beside."""

    def forward(block: Any, maps_NCHW: Tensor) -> Tensor:
        beside = getattr(block, layers)
        return with_shortcut(beside, maps_NCHW, maps_NCHW) if getattr(block, adds) else beside(maps_NCHW)

    return forward


_FORWARDS: dict[str, Callable[..., Tensor]] = {
    "torchvision.models.resnet.ResNet": _resnet,
    "torchvision.models.resnet.BasicBlock": _basic_block,
    "torchvision.models.resnet.Bottleneck": _bottleneck,
    "torchvision.models.densenet._DenseLayer": _dense_layer,
    "torchvision.models.googlenet.BasicConv2d": _basic_conv,
    "torchvision.models.inception.BasicConv2d": _basic_conv,
    "torchvision.models.mobilenetv2.InvertedResidual": _inverted_residual("use_res_connect", "conv"),
    "torchvision.models.mobilenetv3.InvertedResidual": _inverted_residual("use_res_connect", "block"),
    "torchvision.models.mnasnet._InvertedResidual": _inverted_residual("apply_residual", "layers"),
}
"""The forward passes of torchvision's classes, by the functions of `layers`."""
