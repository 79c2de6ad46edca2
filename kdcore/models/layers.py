"""The base class and the layers of the networks in this folder.

Every network has the same three parts, so that a scheme can cut it between them:

    logits = head(trunk(stem(images)))

`stem(x)` and `head(x)` are methods, `trunk()` lists the modules between them in order. No ReLU works in place, so
that a tapped activation does not change. Module names are those of published checkpoints.

Networks compute their batch norms by `conv_norm` and `norm_act`, each in one of three forms:

- eager: module after module. It is the reference, and the only form that calls norm and activation as modules, so it
  is taken wherever one of them has a hook: a tap sees the same in every form of a network.
- fused, where batch norms are in train mode: norm, shortcut and ReLU by one kernel (`kdcore/kernels`);
- folded, in a network that `fold` prepared, without gradients: norm, shortcut and activation within oneDNN's
  convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore import kernels

RELU = nn.ReLU()
"""The ReLU of a place that has no name in its network, so that it cannot be tapped."""


class Network(nn.Module, ABC):
    """The base class: runs the three parts in order."""

    @abstractmethod
    def stem(self, images_NCHW: Tensor) -> Tensor: ...

    @abstractmethod
    def trunk(self) -> list[nn.Module]: ...

    @abstractmethod
    def head(self, maps_NCHW: Tensor) -> Tensor: ...

    def forward(self, images_NCHW: Tensor) -> Tensor:
        maps = self.stem(images_NCHW)
        for part in self.trunk():
            maps = part(maps)
        return self.head(maps)


def conv(width_in: int, width_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution that keeps the image size (except for its stride); the batch norm after it has the bias."""
    return nn.Conv2d(width_in, width_out, size, stride, padding=size // 2, groups=groups, bias=False)


def average(maps_NCHW: Tensor) -> Tensor:
    """Return the global average: N × C."""
    return F.adaptive_avg_pool2d(maps_NCHW, 1).flatten(1)


def he_init(network: nn.Module) -> None:
    """Initialise as He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv:1502.01852, eq. 10 with fan out.

    Classifiers keep PyTorch's default, and batch norms keep ones and zeros.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def conv_norm(
    conv: nn.Module,
    norm: nn.Module | None,
    maps_NCHW: Tensor,
    activation: nn.Module | None = None,
    shortcut: Tensor | None = None,
) -> Tensor:
    """Return activation(norm(conv(maps)) + shortcut); what is None is left out."""
    folded = _folded(conv, norm, activation) if FOLDED in vars(conv) else None
    if folded is not None and not _learns(maps_NCHW, conv) and not _tapped(conv, norm, activation):
        return folded(maps_NCHW, shortcut, activation)
    maps = conv(maps_NCHW)
    if norm is not None:
        return norm_act(norm, maps, activation, shortcut)
    maps = maps if shortcut is None else maps + shortcut
    return maps if activation is None else activation(maps)


def norm_act(
    norm: nn.Module, maps_NCHW: Tensor, activation: nn.Module | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """Return activation(norm(maps) + shortcut); what is None is left out."""
    maps: Tensor | None = None
    if norm.training and type(norm) is nn.BatchNorm2d and not _tapped(norm, activation):
        relu = type(activation) is nn.ReLU
        maps = kernels.norm_relu(norm, maps_NCHW, shortcut, relu=relu)
        if maps is not None and relu:
            return maps
    if maps is None:
        maps = norm(maps_NCHW)
        maps = maps if shortcut is None else maps + shortcut
    return maps if activation is None else activation(maps)


def run_in_turn(modules: Iterable[nn.Module], maps_NCHW: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Run modules one after the other: each convolution with the batch norm and the activation that follow it.
    A shortcut is added to what a convolution with its batch norm, the last of them, returns."""
    rest, maps = list(modules), maps_NCHW
    while rest:
        taken = _taken(rest)
        added = shortcut if taken == len(rest) else None
        if taken > 1:
            maps = conv_norm(rest[0], rest[1], maps, rest[2] if taken == 3 else None, added)
        else:
            maps = rest[0](maps) if added is None else with_shortcut(rest[0], maps, added)
        del rest[:taken]
    return maps


def with_shortcut(module: nn.Module, maps_NCHW: Tensor, shortcut: Tensor) -> Tensor:
    """Return module(maps) + shortcut. If the module is a sequence that ends in a convolution with its batch norm, these
    add the shortcut, unless a tap must see the maps without it."""
    plain = type(module).forward in (nn.Sequential.forward, InTurn.forward)
    if isinstance(module, nn.Sequential) and plain and not _tapped(module):
        return run_in_turn(module, maps_NCHW, shortcut)
    return module(maps_NCHW) + shortcut  # type: ignore[no-any-return]


def _taken(modules: Sequence[nn.Module]) -> int:
    """Return how many of the next modules compute as one: a convolution, its batch norm, its activation."""
    if not _pairs(modules[:2]):
        return 1
    return 3 if len(modules) > 2 and type(modules[2]) in _ATTRIBUTES else 2


def _pairs(modules: Sequence[nn.Module]) -> bool:
    """Return True if a batch norm directly follows a convolution."""
    return any(type(one) is nn.Conv2d and type(other) is nn.BatchNorm2d for one, other in pairwise(modules))


class InTurn(nn.Sequential):
    """An `nn.Sequential` that computes convolutions with their batch norms."""

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return run_in_turn(self, maps_NCHW)


def join_sequences(network: nn.Module) -> None:
    """Let the sequences in a library's network compute convolutions with their batch norms, as `InTurn` does."""
    for module in network.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and _pairs([*module]):
            module.forward = MethodType(run_in_turn, module)


def _tapped(*modules: nn.Module | None) -> bool:
    """Return True if a module has a hook, which must see what eager modules get and return."""
    return any(
        module is not None
        and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )


FOLDED = "folded"
"""The attribute of modules in which `fold` keeps its state. It is no parameter and no buffer: the network's state, so
its checkpoints and exports, stays that of its own layers."""
_ATTRIBUTES: dict[type[nn.Module], tuple[str, list[float], str | None]] = {
    nn.ReLU: ("relu", [], None),
    nn.ReLU6: ("hardtanh", [0.0, 6.0], None),
    nn.Hardswish: ("hardswish", [], None),
    nn.SiLU: ("swish", [], None),
}
"""The activations that oneDNN computes within a convolution: operator, scalars and algorithm."""


def fold(network: nn.Module, bf16: bool) -> None:
    """Let a trained network, in eval mode on a CPU, compute without gradients in the folded form, in bfloat16 or
    float32. Its weights must not change any more: each convolution is folded when it first runs.

    The network then gives the same bits for an image in any place of a batch, beside any others, and with any number
    of threads (tested for the networks listed in `tests/kdcore/models/test_layers.py`).
    """
    precision = torch.bfloat16 if bf16 else torch.float32
    vars(network)[FOLDED] = _Forms(precision)
    for module in network.modules():
        if type(module) is nn.Conv2d:
            vars(module)[FOLDED] = _Forms(precision)


def folded_precision(network: nn.Module) -> torch.dtype | None:
    """Return the precision of a network that `fold` prepared; None for any other."""
    forms: _Forms | None = vars(network).get(FOLDED)
    return None if forms is None else forms.precision


@cache
def can_fold(bf16: bool) -> bool:
    """Return True if oneDNN's fused convolutions exist here, and compute small examples correctly.

    They are private operators of PyTorch's compiler. Seen in PyTorch 2.11 to 2.13.
    """
    precision = torch.bfloat16 if bf16 else torch.float32
    values = (torch.arange(2.0 * 16 * 9 * 9) * 0.7).sin()
    maps = values.view(2, 16, 9, 9).to(precision).to(memory_format=torch.channels_last)
    try:
        for groups, shortcut, activation in ((1, maps, RELU), (1, None, nn.Hardswish()), (16, maps, RELU)):
            layer, norm = nn.Conv2d(16, 16, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(16).eval()
            with torch.no_grad():
                layer.weight.copy_(values[: layer.weight.numel()].view_as(layer.weight) / 8)
                found = _Folded.of(layer, norm, activation, precision)(maps, shortcut, activation)
                expected = norm(layer(maps.float()))
                expected = activation(expected if shortcut is None else expected + shortcut.float())
            if found.dtype != precision or not torch.allclose(found.float(), expected, atol=0.1 if bf16 else 1e-4):
                return False
    except (AttributeError, RuntimeError, TypeError):  # No such operator, no such precision, or another signature.
        return False
    return True


@dataclass(frozen=True)
class _Forms:
    """The folded forms of one convolution by the norm and activation after it; None where there is none."""

    precision: torch.dtype
    by_layers: dict[tuple[nn.Module | None, nn.Module | None], _Folded | None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Folded:
    """A convolution with the batch norm after it in its weights and bias, and the activation after that."""

    weight: Tensor
    """In oneDNN's own layout, so that it is not put into it at each run."""
    bias: Tensor
    """float32, which is added to the sums before they are rounded."""
    bias_with_shortcut: Tensor
    """The same in the precision of the maps, as the operator wants it beside a shortcut."""
    precision: torch.dtype
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    activation: tuple[str, list[float], str | None]

    @classmethod
    def of(
        cls, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, activation: nn.Module | None, precision: torch.dtype
    ) -> _Folded:
        """Fold in float64."""
        weight = conv.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = (norm.running_var.double() + norm.eps).rsqrt()
            scale = scale if norm.weight is None else scale * norm.weight.detach().double()
            weight, bias = weight * scale.view(-1, 1, 1, 1), (bias - norm.running_mean.double()) * scale
            bias = bias if norm.bias is None else bias + norm.bias.detach().double()
        assert not isinstance(conv.padding, str)
        places = conv.padding, conv.stride, conv.dilation, conv.groups
        weight = weight.to(precision).contiguous(memory_format=torch.channels_last)
        weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *places, None)
        attributes = ("none", [], None) if activation is None else _ATTRIBUTES[type(activation)]
        return cls(weight, bias.float(), bias.to(precision), precision, *places, attributes)

    def __call__(self, maps_NCHW: Tensor, shortcut: Tensor | None, activation: nn.Module | None) -> Tensor:
        maps = maps_NCHW.to(self.precision).contiguous(memory_format=torch.channels_last)
        places = self.padding, self.stride, self.dilation, self.groups
        run, (name, scalars, algorithm) = torch.ops.mkldnn._convolution_pointwise, self.activation
        if shortcut is None:
            return run(maps, self.weight, self.bias, *places, name, scalars, algorithm)  # type: ignore[no-any-return]
        shortcut = shortcut.to(self.precision).contiguous(memory_format=torch.channels_last)
        if self.groups == 1 and name in ("none", "relu"):
            after = None if name == "none" else name
            return run.binary(  # type: ignore[no-any-return]
                maps, shortcut, self.weight, self.bias_with_shortcut, *places, "add", None, after, [], None
            )
        sums = run(maps, self.weight, self.bias, *places, "none", [], None) + shortcut
        return sums if activation is None else activation(sums)


def _folded(conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> _Folded | None:
    """Return the folded form of a convolution that `fold` prepared. None if these layers have none, or if the network
    is in train mode."""
    forms: _Forms = vars(conv)[FOLDED]
    key = norm, activation
    if key not in forms.by_layers:
        fits = isinstance(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        fits = fits and (norm is None or (type(norm) is nn.BatchNorm2d and norm.running_mean is not None))
        fits = fits and (activation is None or type(activation) in _ATTRIBUTES)
        forms.by_layers[key] = _Folded.of(conv, norm, activation, forms.precision) if fits else None  # type: ignore[arg-type]
    return None if norm is not None and norm.training else forms.by_layers[key]


def _learns(maps_NCHW: Tensor, conv: nn.Module) -> bool:
    """Return True if gradients are needed, which the folded form does not have."""
    return torch.is_grad_enabled() and (maps_NCHW.requires_grad or any(one.requires_grad for one in conv.parameters()))
