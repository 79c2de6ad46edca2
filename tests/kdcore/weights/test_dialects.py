"""The names of other libraries, written out here from their own code, become those of the networks that are listed.

Only names and shapes are compared, without memory: networks of their size would take seconds.
"""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kdcore.models.networks import skeleton
from kdcore.weights import names
from kdcore.weights.names import Flat

State = dict[str, Tensor]
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def under(rules: Rules, state: State) -> State:
    new = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        new[name] = value
    return new


def less(before: str, after: str) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{before}{int(found[1]) - 1}{after}"


HF_RESNET: Rules = (
    (r"^conv1\.", "resnet.embedder.embedder.convolution."),
    (r"^bn1\.", "resnet.embedder.embedder.normalization."),
    (r"^layer(\d)\.", less("resnet.encoder.stages.", ".layers.")),
    (r"downsample\.0\.", "shortcut.convolution."),
    (r"downsample\.1\.", "shortcut.normalization."),
    (r"\.conv(\d)\.", less(".layer.", ".convolution.")),
    (r"\.bn(\d)\.", less(".layer.", ".normalization.")),
    (r"^fc\.", "classifier.1."),
)
HF_CONVNEXT: Rules = (
    (r"^stem\.0\.", "convnext.embeddings.patch_embeddings."),
    (r"^stem\.1\.", "convnext.embeddings.layernorm."),
    (r"^stages\.(\d)\.downsample\.", r"convnext.encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d)\.blocks\.", r"convnext.encoder.stages.\1.layers."),
    (r"conv_dw\.", "dwconv."),
    (r"(layers\.\d+\.)norm\.", r"\1layernorm."),
    (r"mlp\.fc(\d)\.", r"pwconv\1."),
    (r"gamma$", "layer_scale_parameter"),
    (r"^head\.norm\.", "convnext.layernorm."),
    (r"^head\.fc\.", "classifier."),
)
META_CONVNEXT: Rules = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"conv_dw\.", "dwconv."),
    (r"mlp\.fc(\d)\.", r"pwconv\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)
HF_VIT: Rules = (
    (r"^cls_token", "vit.embeddings.cls_token"),
    (r"^pos_embed", "vit.embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^norm\.", "vit.layernorm."),
    (r"^head\.", "classifier."),
    (r"^blocks\.", "vit.encoder.layer."),
    (r"attn\.proj", "attention.output.dense"),
    (r"attn\.", "attention.attention."),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
)


def empty(name: str, classes: int = 5) -> State:
    return {key: torch.empty(value.shape, device="meta") for key, value in skeleton(name, classes).state_dict().items()}


def separate(state: State) -> State:
    """With queries, keys and values apart, as in Hugging Face's attention."""
    new: State = {}
    for name, value in state.items():
        if ".qkv." in name:
            new |= dict(
                zip((name.replace("qkv", part) for part in ("query", "key", "value")), value.chunk(3), strict=True)
            )
        else:
            new[name] = value
    return new


@pytest.mark.parametrize(
    ("network", "given"),
    [
        ("torchvision/resnet18", lambda: under(HF_RESNET, empty("torchvision/resnet18"))),
        ("torchvision/resnet50", lambda: under(HF_RESNET, empty("torchvision/resnet50"))),
        ("timm/resnet18", lambda: under(HF_RESNET, empty("torchvision/resnet18"))),
        ("torchvision/convnext_tiny", lambda: empty("timm/convnext_tiny")),
        ("torchvision/convnext_tiny", lambda: under(HF_CONVNEXT, empty("timm/convnext_tiny"))),
        ("timm/convnext_tiny", lambda: under(HF_CONVNEXT, empty("timm/convnext_tiny"))),
        ("torchvision/convnext_tiny", lambda: under(META_CONVNEXT, empty("timm/convnext_tiny"))),
        ("timm/convnext_tiny", lambda: under(META_CONVNEXT, empty("timm/convnext_tiny"))),
        ("torchvision/vit_b_16", lambda: empty("timm/vit_base_patch16_224")),
        ("torchvision/vit_b_16", lambda: under(HF_VIT, separate(empty("timm/vit_base_patch16_224")))),
        ("timm/vit_base_patch16_224", lambda: under(HF_VIT, separate(empty("timm/vit_base_patch16_224")))),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_dialects_of_other_libraries_fit_by_their_names(network: str, given: Callable[[], State], prefix: str):
    tensors = {f"{prefix}{name}": value for name, value in given().items()}
    (match,) = names.candidates(names.template(network), Flat(tensors, ordered=False))
    assert match.fits and not match.by_order and match.prefix == prefix
    assert not match.ignored and names.count(names.template(network), match.state, names.CLASSES) == 5


def test_dialects_put_every_tensor_in_its_place():
    """By the values of a network that is small: each tensor of ResNet-18 is a number of its own."""
    own = {name: torch.tensor(float(at)) for at, name in enumerate(empty("torchvision/resnet18"))}
    full = {name: own[name].expand(value.shape) for name, value in empty("torchvision/resnet18").items()}
    file = Flat(under(HF_RESNET, full), ordered=True)
    (match,) = names.candidates(names.template("torchvision/resnet18"), file)
    assert all(value.flatten()[0] == own[name] for name, value in match.state.items())


@pytest.mark.parametrize(
    ("network", "given"),
    [
        ("torchvision/mobilenet_v2", "timm/mobilenetv2_100"),
        ("torchvision/efficientnet_b0", "timm/efficientnet_b0"),
    ],
)
def test_names_of_timm_without_a_dialect_fit_by_order(network: str, given: str):
    (match,) = names.candidates(names.template(network), Flat(empty(given), ordered=True))
    assert match.by_order
    assert names.candidates(names.template(network), Flat(empty(given), ordered=False)) == []
