"""The names that other libraries give to the tensors of the networks that are listed here.

    Hugging Face's ResNet, ConvNeXt and ViT (and DeiT), Meta's own ConvNeXt, timm's ConvNeXt and ViT for torchvision's

Each dialect is a list of rules: a part of a name, and what it becomes. Names that stand before them are kept, so that
prefixes are found afterwards as for any other file.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A regular expression for a part of a path, and what takes its place."""


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file under other names."""

    tensors: Mapping[str, Tensor]
    origins: Mapping[str, str] = field(default_factory=dict)
    """The names in the file, of those that have changed."""

    def origin(self, path: str) -> str:
        return self.origins.get(path, path)


def dialects(shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]) -> Iterator[Renamed]:
    """Yield a file's tensors under their own names, and under those that they have in a network of these shapes."""
    yield Renamed(tensors)
    for telling, rules in _DIALECTS:
        if telling in shapes and (renamed := _rename(rules, tensors)) is not None:
            yield _joined(renamed)
    for rules in (*_shortcuts(shapes), _DENSENET_DOTS):
        if (renamed := _rename(rules, tensors)) is not None:
            yield renamed


def _plus_one(before: str, after: str = "") -> Callable[[re.Match[str]], str]:
    """Return a replacement in which a number is one more than in the file."""
    return lambda found: f"{before}{int(found['n']) + 1}{after}"


_DENSENET_DOTS: Sequence[Rule] = ((r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),)
"""The names that torchvision's DenseNets had before PyTorch forbade dots in the names of modules."""

_START = r"(?:(?<=\.)|^)"

_HF_RESNET: Sequence[Rule] = (
    (rf"{_START}(?:resnet\.)?embedder\.embedder\.convolution\.", "conv1."),
    (rf"{_START}(?:resnet\.)?embedder\.embedder\.normalization\.", "bn1."),
    (rf"{_START}(?:resnet\.)?encoder\.stages\.(?P<n>\d+)\.layers\.", _plus_one("layer", ".")),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    (r"\.layer\.(?P<n>\d)\.convolution\.", _plus_one(".conv", ".")),
    (r"\.layer\.(?P<n>\d)\.normalization\.", _plus_one(".bn", ".")),
)

_HF_CONVNEXT: Sequence[Rule] = (
    (rf"{_START}(?:convnext\.)?embeddings\.patch_embeddings\.", "stem.0."),
    (rf"{_START}(?:convnext\.)?embeddings\.layernorm\.", "stem.1."),
    (rf"{_START}(?:convnext\.)?encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (rf"{_START}(?:convnext\.)?encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"(\.blocks\.\d+\.)dwconv\.", r"\1conv_dw."),
    (r"(\.blocks\.\d+\.)layernorm\.", r"\1norm."),
    (r"(\.blocks\.\d+\.)pwconv([12])\.", r"\1mlp.fc\2."),
    (r"(\.blocks\.\d+\.)layer_scale_parameter$", r"\1gamma"),
    (rf"{_START}(?:convnext\.)?layernorm\.(weight|bias)$", r"head.norm.\1"),
    (rf"{_START}classifier\.(weight|bias)$", r"head.fc.\1"),
)
_META_CONVNEXT: Sequence[Rule] = (
    (rf"{_START}downsample_layers\.0\.", "stem."),
    (rf"{_START}downsample_layers\.([1-3])\.", r"stages.\1.downsample."),
    (rf"{_START}stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"(\.blocks\.\d+\.)dwconv\.", r"\1conv_dw."),
    (r"(\.blocks\.\d+\.)pwconv([12])\.", r"\1mlp.fc\2."),
    (rf"(?<!\d\.){_START}norm\.(weight|bias)$", r"head.norm.\1"),
    (rf"{_START}head\.(weight|bias)$", r"head.fc.\1"),
)
_TIMM_CONVNEXT_IN_TORCHVISION: Sequence[Rule] = (
    (rf"{_START}stem\.([01])\.", r"features.0.\1."),
    (rf"{_START}stages\.(?P<n>\d+)\.downsample\.", lambda found: f"features.{2 * int(found['n'])}."),
    (rf"{_START}stages\.(?P<n>\d+)\.blocks\.", lambda found: f"features.{2 * int(found['n']) + 1}."),
    (r"(features\.\d+\.\d+\.)conv_dw\.", r"\1block.0."),
    (r"(features\.\d+\.\d+\.)norm\.", r"\1block.2."),
    (r"(features\.\d+\.\d+\.)mlp\.fc1\.", r"\1block.3."),
    (r"(features\.\d+\.\d+\.)mlp\.fc2\.", r"\1block.5."),
    (r"(features\.\d+\.\d+\.)gamma$", r"\1layer_scale"),
    (rf"{_START}head\.norm\.", "classifier.0."),
    (rf"{_START}head\.fc\.", "classifier.2."),
)

_HF_VIT: Sequence[Rule] = (
    (rf"{_START}(?:(?:vit|deit)\.)?embeddings\.cls_token$", "cls_token"),
    (rf"{_START}(?:(?:vit|deit)\.)?embeddings\.position_embeddings$", "pos_embed"),
    (rf"{_START}(?:(?:vit|deit)\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (rf"{_START}(?:(?:vit|deit)\.)?(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+\.)attention\.q_proj\.", r"\1attn.query."),
    (r"(blocks\.\d+\.)attention\.k_proj\.", r"\1attn.key."),
    (r"(blocks\.\d+\.)attention\.v_proj\.", r"\1attn.value."),
    (r"(blocks\.\d+\.)attention\.o_proj\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)attention\.attention\.(query|key|value)\.", r"\1attn.\2."),
    (r"(blocks\.\d+\.)attention\.output\.dense\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (rf"{_START}(?:(?:vit|deit)\.)?layernorm\.(weight|bias)$", r"norm.\1"),
    (rf"{_START}classifier\.(weight|bias)$", r"head.\1"),
)
_TIMM_VIT_IN_TORCHVISION: Sequence[Rule] = (
    (rf"{_START}cls_token$", "class_token"),
    (rf"{_START}pos_embed$", "encoder.pos_embedding"),
    (rf"{_START}patch_embed\.proj\.", "conv_proj."),
    (rf"{_START}blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"(encoder_layer_\d+\.)norm([12])\.", r"\1ln_\2."),
    (r"(encoder_layer_\d+\.)attn\.(qkv|query|key|value)\.(weight|bias)$", r"\1self_attention.\2.\3"),
    (r"self_attention\.qkv\.(weight|bias)$", r"self_attention.in_proj_\1"),
    (r"(encoder_layer_\d+\.)attn\.proj\.", r"\1self_attention.out_proj."),
    (r"(encoder_layer_\d+\.)mlp\.fc1\.", r"\1mlp.0."),
    (r"(encoder_layer_\d+\.)mlp\.fc2\.", r"\1mlp.3."),
    (rf"{_START}norm\.(weight|bias)$", r"encoder.ln.\1"),
    (rf"{_START}head\.(weight|bias)$", r"heads.head.\1"),
)

_DIALECTS: Sequence[tuple[str, Sequence[Rule]]] = (
    ("layer1.0.conv1.weight", _HF_RESNET),
    ("stages.0.blocks.0.conv_dw.weight", _HF_CONVNEXT),
    ("stages.0.blocks.0.conv_dw.weight", _META_CONVNEXT),
    ("features.1.0.layer_scale", (*_HF_CONVNEXT, *_TIMM_CONVNEXT_IN_TORCHVISION)),
    ("features.1.0.layer_scale", (*_META_CONVNEXT, *_TIMM_CONVNEXT_IN_TORCHVISION)),
    ("features.1.0.layer_scale", _TIMM_CONVNEXT_IN_TORCHVISION),
    ("blocks.0.attn.qkv.weight", _HF_VIT),
    ("encoder.layers.encoder_layer_0.ln_1.weight", (*_HF_VIT, *_TIMM_VIT_IN_TORCHVISION)),
    ("encoder.layers.encoder_layer_0.ln_1.weight", _TIMM_VIT_IN_TORCHVISION),
)
"""Dialects, each with a name that the network must have."""


def _shortcuts(shapes: Mapping[str, Sequence[int]]) -> Iterator[Sequence[Rule]]:
    """Yield the two names of a residual block's shortcut, in the direction that this network needs."""
    for one, other in (("shortcut", "downsample"), ("downsample", "shortcut")):
        if any(f".{other}." in name for name in shapes):
            yield ((rf"\.{one}\.", f".{other}."),)


def _rename(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> Renamed | None:
    """Return tensors under new names; None if no name changes, or two become one."""
    new: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for path, tensor in tensors.items():
        name = path
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name != path:
            origins[name] = path
        # A scale for each channel is a vector in one library, and a map of one place in another.
        new[name] = tensor[:, None, None] if name.endswith(".layer_scale") and tensor.ndim == 1 else tensor
    return Renamed(new, origins) if origins and len(new) == len(tensors) else None


def _joined(renamed: Renamed) -> Renamed:
    """Return tensors with queries, keys and values in one, as timm's and torchvision's attention has them."""
    tensors, origins = dict(renamed.tensors), dict(renamed.origins)
    for path in renamed.tensors:
        found = re.fullmatch(r"(.*\.(attn|self_attention)\.)query\.(weight|bias)", path)
        if found is None:
            continue
        each = [f"{found[1]}{part}.{found[3]}" for part in ("query", "key", "value")]
        if not all(one in tensors for one in each):
            continue
        name = f"{found[1]}{'qkv.' if found[2] == 'attn' else 'in_proj_'}{found[3]}"
        origins[name] = " + ".join(origins.pop(one, one) for one in each)
        tensors[name] = torch.cat([tensors.pop(one) for one in each])
    return Renamed(tensors, origins)
