"""The facts of every named network, without torch and without building it.

Plain names such as `resnet20` are the usual networks for small images; `torchvision/<name>` and `timm/<name>` are those
of the two libraries. The numbers are exact: tests compare them with the networks.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from kdcore.catalog.facts import ArchitectureFacts


class UnknownName(ValueError):
    """The name of no architecture, with similar names."""

    def __init__(self, name: str, nearest: list[str]) -> None:
        suggestion = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        super().__init__(f"there is no architecture {name!r}{suggestion}")
        self.name = name
        self.nearest = nearest


@dataclass(frozen=True)
class HiddenLayer:
    """A layer between a network's embedding and its classifier: linear, a batch norm if it has one, an activation."""

    units: int
    activation: str
    batch_norm: bool = False

    @property
    def suffix(self) -> str:
        return f"+{'bn_' if self.batch_norm else ''}{self.activation}{self.units}"


ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "linear")
"""Of hidden layers; linear is none."""
_HIDDEN = re.compile(rf"(bn_)?({'|'.join(ACTIVATIONS)})([1-9]\d{{0,5}})")


def hidden_layers(name: str) -> tuple[str, tuple[HiddenLayer, ...]]:
    """Return an architecture's name without its hidden layers, and these: `resnet20+relu64` has one of 64 units."""
    bare, *suffixes = name.split("+")
    layers = [_HIDDEN.fullmatch(suffix) for suffix in suffixes]
    if not all(layers):
        raise UnknownName(name, _nearest(bare))
    return bare, tuple(HiddenLayer(int(one[3]), one[2], one[1] is not None) for one in layers if one)


def architecture(name: str) -> ArchitectureFacts:
    """Return the facts of an architecture; for timm only the form of the name is checked. Raises UnknownName."""
    bare, layers = hidden_layers(name)
    if layers:
        return _with_hidden_layers(name, architecture(bare), layers)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if re.fullmatch(r"timm/[a-z0-9_]+(\.[a-z0-9_]+)?", name):
        return ArchitectureFacts(name=name, source="timm", family="timm", min_image=1, channels="any")
    raise UnknownName(name, _nearest(name))


def _with_hidden_layers(name: str, facts: ArchitectureFacts, layers: Sequence[HiddenLayer]) -> ArchitectureFacts:
    """Return the facts of a network whose classifier is a sequence. Its embedding is the last linear layer's input."""
    if facts.source != "timm" and (facts.embedding is None or facts.embedding_width is None):
        raise UnknownName(name, [facts.name])
    if facts.embedding is None or facts.embedding_width is None:
        return facts.model_copy(update={"name": name})
    width, body, modules = facts.embedding_width, facts.body_parameters, 0
    for layer in layers:
        more = layer.units * (width + 1) + 2 * layer.units * layer.batch_norm
        body = None if body is None else body + more
        modules += 1 + layer.batch_norm + (layer.activation != "linear")
        width = layer.units
    classifier = facts.embedding.removesuffix("@in")
    update = {"embedding": f"{classifier}.{modules}@in", "embedding_width": width, "body_parameters": body}
    return facts.model_copy(update={"name": name, **update})


def _nearest(name: str) -> list[str]:
    """Return up to three similar names. Those of torchvision also match without their prefix."""
    wanted = name.lower().replace("-", "_")
    names = {known.removeprefix("torchvision/"): known for known in ARCHITECTURES}
    names |= {known: known for known in ARCHITECTURES}
    close = get_close_matches(wanted, names, n=3)
    return list(dict.fromkeys(names[match] for match in close))


# The usual networks for small images. family: (embedding, smallest image, taps)
FIELD_FAMILIES: dict[str, tuple[str, int, list[str]]] = {
    "resnet": ("fc@in", 4, ["layer1", "layer2", "layer3"]),
    "resnet18": ("linear@in", 8, ["layer1", "layer2", "layer3", "layer4"]),
    "resnet50": ("linear@in", 8, ["layer1", "layer2", "layer3", "layer4"]),
    "wrn": ("fc@in", 4, ["block1", "block2", "block3"]),
    "vgg": ("classifier@in", 8, ["block0", "block1", "block2", "block3", "block4"]),
    "mobilenetv2": ("classifier@in", 16, ["blocks.1", "blocks.2", "blocks.4", "blocks.6"]),
    "shufflenetv1": ("linear@in", 8, ["layer1", "layer2", "layer3"]),
    "shufflenetv2": ("linear@in", 8, ["layer1", "layer2", "layer3"]),
    "convnet": ("fc@in", 2, ["layer1", "layer2", "layer3"]),
}

# name: (family, body parameters, stem parameters per input channel, embedding width)
FIELD: dict[str, tuple[str, int, int, int]] = {
    "resnet8": ("resnet", 76_960, 144, 64),
    "resnet14": ("resnet", 174_176, 144, 64),
    "resnet20": ("resnet", 271_392, 144, 64),
    "resnet32": ("resnet", 465_824, 144, 64),
    "resnet44": ("resnet", 660_256, 144, 64),
    "resnet56": ("resnet", 854_688, 144, 64),
    "resnet110": ("resnet", 1_729_632, 144, 64),
    "resnet8x4": ("resnet", 1_206_976, 288, 256),
    "resnet32x4": ("resnet", 7_407_296, 288, 256),
    "resnet8_option_a": ("resnet", 74_208, 144, 64),
    "resnet14_option_a": ("resnet", 171_424, 144, 64),
    "resnet20_option_a": ("resnet", 268_640, 144, 64),
    "resnet32_option_a": ("resnet", 463_072, 144, 64),
    "resnet44_option_a": ("resnet", 657_504, 144, 64),
    "resnet56_option_a": ("resnet", 851_936, 144, 64),
    "resnet110_option_a": ("resnet", 1_726_880, 144, 64),
    "resnet18_cifar": ("resnet18", 11_167_104, 576, 512),
    "resnet34_cifar": ("resnet18", 21_275_264, 576, 512),
    "resnet50_cifar": ("resnet50", 23_498_624, 576, 2_048),
    "wrn_16_1": ("wrn", 173_984, 144, 64),
    "wrn_16_2": ("wrn", 689_952, 144, 128),
    "wrn_40_1": ("wrn", 562_848, 144, 64),
    "wrn_40_2": ("wrn", 2_241_824, 144, 128),
    "vgg8": ("vgg", 3_912_000, 576, 512),
    "vgg11": ("vgg", 9_224_256, 576, 512),
    "vgg13": ("vgg", 9_409_152, 576, 512),
    "vgg16": ("vgg", 14_721_408, 576, 512),
    "vgg19": ("vgg", 20_033_664, 576, 512),
    "mobilenetv2_x0_5": ("mobilenetv2", 684_304, 144, 1_280),
    "shufflenetv1": ("shufflenetv1", 853_086, 24, 960),
    "shufflenetv2": ("shufflenetv2", 1_252_956, 24, 1_024),
    "convnet4": ("convnet", 904, 36, 8),
    "convnet8": ("convnet", 3_536, 72, 16),
    "convnet16": ("convnet", 13_984, 144, 32),
    "convnet32": ("convnet", 55_616, 288, 64),
    "convnet64": ("convnet", 221_824, 576, 128),
}

# torchvision's classifiers that both 0.26 and 0.28 have. Below 16 pixels, padded ones still run, but on padding only.
# family: (embedding, smallest image, taps); vit's taps depend on its depth.
TORCHVISION_FAMILIES: dict[str, tuple[str | None, int, list[str]]] = {
    "alexnet": ("classifier.6@in", 63, ["features.2", "features.5", "features.12"]),
    "convnext": ("classifier.2@in", 32, ["features.1", "features.3", "features.5", "features.7"]),
    "densenet": ("classifier@in", 29, [f"features.denseblock{block}" for block in (1, 2, 3, 4)]),
    "efficientnet": ("classifier.1@in", 16, ["features.2", "features.3", "features.5", "features.7"]),
    "efficientnet_v2_s": ("classifier.1@in", 16, ["features.2", "features.3", "features.5", "features.6"]),
    "googlenet": ("fc@in", 15, ["inception3b", "inception4e", "inception5b"]),
    "inception": ("fc@in", 75, ["Mixed_5d", "Mixed_6e", "Mixed_7c"]),
    "maxvit": ("classifier.5@in", 224, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
    "mnasnet": ("classifier.1@in", 16, ["layers.8", "layers.9", "layers.11", "layers.13"]),
    "mobilenet_v2": ("classifier.1@in", 16, ["features.3", "features.6", "features.13", "features.17"]),
    "mobilenet_v3_large": ("classifier.3@in", 16, ["features.3", "features.6", "features.12", "features.15"]),
    "mobilenet_v3_small": ("classifier.3@in", 16, ["features.1", "features.3", "features.8", "features.11"]),
    "regnet": ("fc@in", 16, [f"trunk_output.block{block}" for block in (1, 2, 3, 4)]),
    "resnet": ("fc@in", 16, ["layer1", "layer2", "layer3", "layer4"]),
    "shufflenet_v2": ("fc@in", 16, ["stage2", "stage3", "stage4"]),
    "squeezenet1_0": (None, 21, ["features.5", "features.10", "features.12"]),
    "squeezenet1_1": (None, 17, ["features.4", "features.7", "features.12"]),
    "swin": ("head@in", 16, [f"features.{stage}@nhwc" for stage in (1, 3, 5, 7)]),
    "vgg11": ("classifier.6@in", 32, [f"features.{pool}" for pool in (2, 5, 10, 15, 20)]),
    "vgg11_bn": ("classifier.6@in", 32, [f"features.{pool}" for pool in (3, 7, 14, 21, 28)]),
    "vgg13": ("classifier.6@in", 32, [f"features.{pool}" for pool in (4, 9, 14, 19, 24)]),
    "vgg13_bn": ("classifier.6@in", 32, [f"features.{pool}" for pool in (6, 13, 20, 27, 34)]),
    "vgg16": ("classifier.6@in", 32, [f"features.{pool}" for pool in (4, 9, 16, 23, 30)]),
    "vgg16_bn": ("classifier.6@in", 32, [f"features.{pool}" for pool in (6, 13, 23, 33, 43)]),
    "vgg19": ("classifier.6@in", 32, [f"features.{pool}" for pool in (4, 9, 18, 27, 36)]),
    "vgg19_bn": ("classifier.6@in", 32, [f"features.{pool}" for pool in (6, 13, 26, 39, 52)]),
    "vit": ("heads.head@in", 224, []),
}
ONE_IMAGE_SIZE = ("maxvit", "vit")

# name: (family, body parameters, stem parameters per input channel, embedding width, channels at each tap); None if
# the classifier is not a linear layer with bias.
TORCHVISION: dict[str, tuple[str, int | None, int, int | None, list[int]]] = {
    "alexnet": ("alexnet", 56_980_608, 7_744, 4_096, [64, 192, 256]),
    "convnext_base": ("convnext", 87_560_320, 2_048, 1_024, [128, 256, 512, 1024]),
    "convnext_large": ("convnext", 196_221_120, 3_072, 1_536, [192, 384, 768, 1536]),
    "convnext_small": ("convnext", 49_450_080, 1_536, 768, [96, 192, 384, 768]),
    "convnext_tiny": ("convnext", 27_815_520, 1_536, 768, [96, 192, 384, 768]),
    "densenet121": ("densenet", 6_944_448, 3_136, 1_024, [256, 512, 1024, 1024]),
    "densenet161": ("densenet", 26_457_888, 4_704, 2_208, [384, 768, 2112, 2208]),
    "densenet169": ("densenet", 12_475_072, 3_136, 1_664, [256, 512, 1280, 1664]),
    "densenet201": ("densenet", 18_083_520, 3_136, 1_920, [256, 512, 1792, 1920]),
    "efficientnet_b0": ("efficientnet", 4_006_684, 288, 1_280, [24, 40, 112, 320]),
    "efficientnet_b1": ("efficientnet", 6_512_320, 288, 1_280, [24, 40, 112, 320]),
    "efficientnet_b2": ("efficientnet", 7_700_130, 288, 1_408, [24, 48, 120, 352]),
    "efficientnet_b3": ("efficientnet", 10_695_152, 360, 1_536, [32, 48, 136, 384]),
    "efficientnet_b4": ("efficientnet", 17_547_320, 432, 1_792, [32, 56, 160, 448]),
    "efficientnet_b5": ("efficientnet", 28_339_488, 432, 2_048, [40, 64, 176, 512]),
    "efficientnet_b6": ("efficientnet", 40_734_192, 504, 2_304, [40, 72, 200, 576]),
    "efficientnet_b7": ("efficientnet", 63_785_232, 576, 2_560, [48, 80, 224, 640]),
    "efficientnet_v2_l": ("efficientnet", 117_233_408, 288, 1_280, [64, 96, 224, 640]),
    "efficientnet_v2_m": ("efficientnet", 52_857_708, 216, 1_280, [48, 80, 176, 512]),
    "efficientnet_v2_s": ("efficientnet_v2_s", 20_176_840, 216, 1_280, [48, 64, 160, 256]),
    "googlenet": ("googlenet", 5_590_496, 3_136, 1_024, [480, 832, 1024]),
    "inception_v3": ("inception", 21_784_704, 288, 2_048, [288, 768, 2048]),
    "maxvit_t": ("maxvit", None, 576, 512, [64, 128, 256, 512]),
    "mnasnet0_5": ("mnasnet", 937_080, 144, 1_280, [16, 24, 48, 160]),
    "mnasnet0_75": ("mnasnet", 1_888_560, 216, 1_280, [24, 32, 72, 240]),
    "mnasnet1_0": ("mnasnet", 3_101_448, 288, 1_280, [24, 40, 96, 320]),
    "mnasnet1_3": ("mnasnet", 5_000_176, 360, 1_280, [32, 56, 128, 416]),
    "mobilenet_v2": ("mobilenet_v2", 2_223_008, 288, 1_280, [24, 32, 96, 320]),
    "mobilenet_v3_large": ("mobilenet_v3_large", 4_201_600, 144, 1_280, [24, 40, 112, 160]),
    "mobilenet_v3_small": ("mobilenet_v3_small", 1_517_424, 144, 1_024, [16, 24, 48, 96]),
    "regnet_x_16gf": ("regnet", 52_228_672, 288, 2_048, [256, 512, 896, 2048]),
    "regnet_x_1_6gf": ("regnet", 8_276_272, 288, 912, [72, 168, 408, 912]),
    "regnet_x_32gf": ("regnet", 105_289_696, 288, 2_520, [336, 672, 1344, 2520]),
    "regnet_x_3_2gf": ("regnet", 14_286_688, 288, 1_008, [96, 192, 432, 1008]),
    "regnet_x_400mf": ("regnet", 5_094_112, 288, 400, [32, 64, 160, 400]),
    "regnet_x_800mf": ("regnet", 6_585_792, 288, 672, [64, 128, 288, 672]),
    "regnet_x_8gf": ("regnet", 37_650_784, 288, 1_920, [80, 240, 720, 1920]),
    "regnet_y_128gf": ("regnet", 637_419_030, 288, 7_392, [528, 1056, 2904, 7392]),
    "regnet_y_16gf": ("regnet", 80_564_276, 288, 3_024, [224, 448, 1232, 3024]),
    "regnet_y_1_6gf": ("regnet", 10_312_566, 288, 888, [48, 120, 336, 888]),
    "regnet_y_32gf": ("regnet", 141_332_906, 288, 3_712, [232, 696, 1392, 3712]),
    "regnet_y_3_2gf": ("regnet", 17_922_474, 288, 1_512, [72, 216, 576, 1512]),
    "regnet_y_400mf": ("regnet", 3_902_280, 288, 440, [48, 104, 208, 440]),
    "regnet_y_800mf": ("regnet", 5_646_648, 288, 784, [64, 144, 320, 784]),
    "regnet_y_8gf": ("regnet", 37_363_608, 288, 2_016, [224, 448, 896, 2016]),
    "resnet101": ("resnet", 42_490_752, 3_136, 2_048, [256, 512, 1024, 2048]),
    "resnet152": ("resnet", 58_134_400, 3_136, 2_048, [256, 512, 1024, 2048]),
    "resnet18": ("resnet", 11_167_104, 3_136, 512, [64, 128, 256, 512]),
    "resnet34": ("resnet", 21_275_264, 3_136, 512, [64, 128, 256, 512]),
    "resnet50": ("resnet", 23_498_624, 3_136, 2_048, [256, 512, 1024, 2048]),
    "resnext101_32x8d": ("resnet", 86_732_928, 3_136, 2_048, [256, 512, 1024, 2048]),
    "resnext101_64x4d": ("resnet", 81_396_864, 3_136, 2_048, [256, 512, 1024, 2048]),
    "resnext50_32x4d": ("resnet", 22_970_496, 3_136, 2_048, [256, 512, 1024, 2048]),
    "shufflenet_v2_x0_5": ("shufflenet_v2", 341_144, 216, 1_024, [48, 96, 192]),
    "shufflenet_v2_x1_0": ("shufflenet_v2", 1_252_956, 216, 1_024, [116, 232, 464]),
    "shufflenet_v2_x1_5": ("shufflenet_v2", 2_477_976, 216, 1_024, [176, 352, 704]),
    "shufflenet_v2_x2_0": ("shufflenet_v2", 5_344_348, 216, 2_048, [244, 488, 976]),
    "squeezenet1_0": ("squeezenet1_0", None, 4_704, None, [256, 512, 512]),
    "squeezenet1_1": ("squeezenet1_1", None, 576, None, [128, 256, 512]),
    "swin_b": ("swin", 86_737_080, 2_048, 1_024, [128, 256, 512, 1024]),
    "swin_s": ("swin", 48_832_650, 1_536, 768, [96, 192, 384, 768]),
    "swin_t": ("swin", 27_514_746, 1_536, 768, [96, 192, 384, 768]),
    "swin_v2_b": ("swin", 86_899_704, 2_048, 1_024, [128, 256, 512, 1024]),
    "swin_v2_s": ("swin", 48_963_834, 1_536, 768, [96, 192, 384, 768]),
    "swin_v2_t": ("swin", 27_577_962, 1_536, 768, [96, 192, 384, 768]),
    "vgg11": ("vgg11", 128_764_608, 576, 4_096, [64, 128, 256, 512, 512]),
    "vgg11_bn": ("vgg11_bn", 128_770_112, 576, 4_096, [64, 128, 256, 512, 512]),
    "vgg13": ("vgg13", 128_949_120, 576, 4_096, [64, 128, 256, 512, 512]),
    "vgg13_bn": ("vgg13_bn", 128_955_008, 576, 4_096, [64, 128, 256, 512, 512]),
    "vgg16": ("vgg16", 134_258_816, 576, 4_096, [64, 128, 256, 512, 512]),
    "vgg16_bn": ("vgg16_bn", 134_267_264, 576, 4_096, [64, 128, 256, 512, 512]),
    "vgg19": ("vgg19", 139_568_512, 576, 4_096, [64, 128, 256, 512, 512]),
    "vgg19_bn": ("vgg19_bn", 139_579_520, 576, 4_096, [64, 128, 256, 512, 512]),
    "vit_b_16": ("vit", 85_208_832, 196_608, 768, [768, 768, 768, 768]),
    "vit_b_32": ("vit", 85_095_936, 786_432, 768, [768, 768, 768, 768]),
    "vit_h_14": ("vit", 630_012_160, 250_880, 1_280, [1280, 1280, 1280, 1280]),
    "vit_l_16": ("vit", 302_515_200, 262_144, 1_024, [1024, 1024, 1024, 1024]),
    "vit_l_32": ("vit", 302_364_672, 1_048_576, 1_024, [1024, 1024, 1024, 1024]),
    "wide_resnet101_2": ("resnet", 124_828_288, 3_136, 2_048, [256, 512, 1024, 2048]),
    "wide_resnet50_2": ("resnet", 66_824_832, 3_136, 2_048, [256, 512, 1024, 2048]),
}


RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
VGG_LAYERS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VIT_LAYERS = {"vit_b": 12, "vit_l": 24, "vit_h": 32}


def _field() -> Iterator[ArchitectureFacts]:
    for name, (family, body, stem, width) in FIELD.items():
        embedding, min_image, taps = FIELD_FAMILIES[family]
        preactivations, margins = _field_before_relus(name, family, taps)
        yield ArchitectureFacts(
            name=name,
            source="kdcore",
            family=family,
            min_image=min_image,
            channels="any",
            taps=taps,
            tap_widths=_field_widths(family, width),
            preactivations=preactivations,
            margins=margins,
            embedding=embedding,
            embedding_width=width,
            body_parameters=body,
            stem_parameters_per_channel=stem,
        )


def _field_widths(family: str, width: int) -> list[int]:
    """Return the channels at each tap, from the width of the embedding."""
    return {
        "resnet": [width // 4, width // 2, width],
        "resnet18": [64, 128, 256, 512],
        "resnet50": [256, 512, 1024, 2048],
        "wrn": [width // 4, width // 2, width],
        "vgg": [64, 128, 256, 512, 512],
        "mobilenetv2": [12, 16, 48, 160],
        "shufflenetv1": [240, 480, 960],
        "shufflenetv2": [116, 232, 464],
        "convnet": [width // 2, width, width],
    }[family]


def _field_before_relus(name: str, family: str, taps: list[str]) -> tuple[list[str], list[str]]:
    """Return preactivations and margins. shufflenetv2 has none: half of its channels pass a ReLU early in a stage."""
    if family == "resnet":
        blocks = _each(taps, str((_depth(name) - 2) // 6 - 1))
        return _each(blocks, "relu@in"), _each(blocks, "bn2")
    if family in ("resnet18", "resnet50", "shufflenetv1"):
        counts = (4, 8, 4) if family == "shufflenetv1" else RESNET_BLOCKS[_depth(name)]
        blocks = [f"{tap}.{count - 1}" for tap, count in zip(taps, counts, strict=True)]
        return _each(blocks, "relu@in"), _each(blocks, "bn2" if family == "resnet18" else "bn3")
    if family == "mobilenetv2":
        return taps, ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"]
    if family == "vgg":
        norms = [f"{tap}.{3 * layers - 2}" for tap, layers in zip(taps, VGG_LAYERS[name], strict=True)]
    elif family == "wrn":
        # A stage ends in a plain sum. The batch norm before the next ReLU belongs to the next stage.
        norms = ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]
    else:
        norms = _each(taps, "1") if family == "convnet" else []
    return norms, norms


def _torchvision() -> Iterator[ArchitectureFacts]:
    for name, (family, body, stem, width, tap_widths) in TORCHVISION.items():
        embedding, min_image, taps = TORCHVISION_FAMILIES[family]
        preactivations, margins = _torchvision_before_relus(name, family, taps)
        yield ArchitectureFacts(
            name=f"torchvision/{name}",
            source="torchvision",
            family=family,
            min_image=min_image,
            max_image=min_image if family in ONE_IMAGE_SIZE else None,
            channels=3,
            taps=taps if family != "vit" else _quarters(VIT_LAYERS[name.rpartition("_")[0]]),
            tap_widths=tap_widths,
            preactivations=preactivations,
            margins=margins,
            embedding=embedding,
            embedding_width=width,
            body_parameters=body,
            stem_parameters_per_channel=stem,
        )


def _quarters(layers: int) -> list[str]:
    """Return the taps of a transformer, which has no stages: the layer at the end of each quarter of its depth."""
    return [f"encoder.layers.encoder_layer_{quarter * layers // 4 - 1}@tokens" for quarter in (1, 2, 3, 4)]


def _torchvision_before_relus(name: str, family: str, taps: list[str]) -> tuple[list[str], list[str]]:
    """Return preactivations and margins.

    Families with ReLU that have none: densenet overwrites the input of its last ReLU; googlenet, inception, shufflenet
    and squeezenet concatenate the outputs of several ReLUs; regnet's are not listed.
    """
    if family == "resnet":
        depth = _depth(name)
        blocks = [f"{tap}.{count - 1}" for tap, count in zip(taps, RESNET_BLOCKS[depth], strict=True)]
        return _each(blocks, "last_relu@in"), _each(blocks, "bn2" if depth < 50 else "bn3")
    if family == "alexnet" or family.startswith("vgg"):
        # A tap is a pooling. Before it is a ReLU, and before that a batch norm or a convolution.
        before = [f"features.{int(tap.removeprefix('features.')) - 2}" for tap in taps]
        return before, before if family.endswith("_bn") else []
    if family == "mobilenet_v2":
        return taps, _each(taps, "conv.3")
    if family == "mnasnet":
        return taps, [f"layers.{block}.layers.7" for block in ("8.2", "9.2", "11.1", "13.0")]
    return [], []


def _each(paths: list[str], inside: str) -> list[str]:
    return [f"{path}.{inside}" for path in paths]


def _depth(name: str) -> int:
    """Return the depth of a ResNet: the first number in its name."""
    return int(re.findall(r"\d+", name)[0])


ARCHITECTURES: dict[str, ArchitectureFacts] = {facts.name: facts for facts in (*_field(), *_torchvision())}
