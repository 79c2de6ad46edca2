"""The base class and the layers of the networks in this folder.

Every network has the same three parts, so that a scheme can cut it between them:

    logits = head(trunk(stem(images)))

`stem(x)` and `head(x)` are methods, `trunk()` lists the modules between them in order. No ReLU works in place, so
that a tapped activation does not change. Module names are those of published checkpoints.

Networks compute their batch norms by `conv_norm` and `norm_act`, each in one of three forms:

- eager: module after module. It is the reference, and the only form that calls norm and activation as modules, so it
  is taken wherever one of them has a hook: a tap sees the same in every form of a network.
- fused, where batch norms are in train mode: norm, shortcut and ReLU by one kernel (`kdcore/kernels`);
- folded, in a network that `fold` prepared, without gradients: norm, shortcut and activation within the convolution,
  which is oneDNN's or, of 3 × 3, our own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kdcore import kernels
from kdcore.kernels.convolution import Packed

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
    folded = _folded(conv, norm, activation) if FOLDED in vars(conv) and maps_NCHW.device.type == "cpu" else None
    if folded is not None and not _learns(maps_NCHW, conv) and not _tapped(conv, norm, activation):
        return folded(maps_NCHW, shortcut, activation)
    maps = _convolved(conv, maps_NCHW)
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
        if maps is not None:
            _ran_as(FUSED, norm)
        if maps is not None and relu:
            return maps
    if maps is None:
        maps = norm(maps_NCHW)
        maps = maps if shortcut is None else maps + shortcut
    return maps if activation is None else activation(maps)


def run_in_turn(modules: Iterable[nn.Module], maps_NCHW: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Run modules one after the other: each batch norm with the convolution before it and the activation after it.
    A shortcut is added at the end; by the last of them, if that can do it."""
    rest, maps = list(modules), maps_NCHW
    while rest:
        first = rest.pop(0)
        conv = first if type(first) is nn.Conv2d and rest and type(rest[0]) is nn.BatchNorm2d else None
        norm = first if conv is None else rest.pop(0)
        if type(norm) is nn.BatchNorm2d:
            activation = rest.pop(0) if rest and type(rest[0]) in _ATTRIBUTES else None
            added = None if rest or activation is not None else shortcut
            if conv is None:
                maps = norm_act(norm, maps, activation, added)
            else:
                maps = conv_norm(conv, norm, maps, activation, added)
            if added is not None:
                return maps
        elif rest or shortcut is None:
            maps = first(maps)
        else:
            return with_shortcut(first, maps, shortcut)
    return maps if shortcut is None else maps + shortcut


def with_shortcut(module: nn.Module, maps_NCHW: Tensor, shortcut: Tensor) -> Tensor:
    """Return module(maps) + shortcut. If the module is a sequence that ends in a batch norm, this adds the shortcut,
    unless a tap must see the maps without it."""
    plain = type(module).forward in (nn.Sequential.forward, InTurn.forward)
    if isinstance(module, nn.Sequential) and plain and not _tapped(module):
        return run_in_turn(module, maps_NCHW, shortcut)
    return module(maps_NCHW) + shortcut


class InTurn(nn.Sequential):
    """An `nn.Sequential` that computes a batch norm with what is beside it."""

    def forward(self, maps_NCHW: Tensor) -> Tensor:
        return run_in_turn(self, maps_NCHW)


def join_sequences(network: nn.Module) -> None:
    """Let the sequences in a library's network compute their batch norms as `InTurn` does."""
    for module in network.modules():
        plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        if plain and any(type(child) is nn.BatchNorm2d for child in module.children()):
            module.forward = MethodType(run_in_turn, module)


def _convolved(conv: nn.Module, maps_NCHW: Tensor) -> Tensor:
    """Return conv(maps): of 3 × 3 convolutions by our own kernel; depthwise ones have the gradients of `_Depthwise`."""
    own = kernels.conv3x3(conv, maps_NCHW)
    if own is not None:
        _ran_as(OWN, conv)
        return own
    slow = (
        type(conv) is nn.Conv2d
        and conv.groups > 1
        and conv.groups == conv.in_channels
        and max(*conv.stride, *(size - 2 for size in conv.kernel_size)) > 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and kernels.enabled()
        and type(maps_NCHW) is Tensor
        and maps_NCHW.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not _tapped(conv)
    )
    if not slow:
        return conv(maps_NCHW)
    assert isinstance(conv, nn.Conv2d)
    bias = None if conv.bias is None else conv.bias.bfloat16()
    places = conv.stride, conv.padding, conv.dilation, conv.groups
    return _Depthwise.apply(maps_NCHW.bfloat16(), conv.weight, bias, places)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution in bfloat16 that computes some of its gradients in float32.

    In bfloat16 oneDNN has only its reference code for the gradient of the maps with a stride, and for the gradient of
    weights larger than 3 × 3: measured 53 ms against 0.4 ms, and 26 ms against 4 ms. The output is that of `conv2d`,
    bit for bit; the gradients are rounded less.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, places: tuple[Any, ...]) -> Tensor:
        rounded = weight.bfloat16()
        ctx.save_for_backward(maps, rounded)
        ctx.places, ctx.has_bias = places, bias is not None
        return torch.conv2d(maps, rounded, bias, *places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.places
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        in_float32 = wanted[0] and max(stride) > 1, wanted[1] and max(weight.shape[2:]) > 3
        in_own = wanted[0] and not in_float32[0], wanted[1] and not in_float32[1]
        found: list[Tensor | None] = [None, None]
        for precision, mask in ((torch.float32, in_float32), (torch.bfloat16, in_own)):
            if any(mask):
                tensors = (one.to(precision) for one in (gradient, maps, weight))
                each = torch.ops.aten.convolution_backward(
                    *tensors, None, stride, padding, dilation, False, (0, 0), groups, (*mask, False)
                )
                found = [new if taken else old for old, new, taken in zip(found, each, mask, strict=False)]
        to_maps, to_weight = found
        return (
            None if to_maps is None else to_maps.to(maps.dtype),
            None if to_weight is None else to_weight.float(),
            gradient.sum((0, 2, 3)) if ctx.has_bias else None,
            None,
        )


def _tapped(*modules: nn.Module | None) -> bool:
    """Return True if a module has a hook, which must see what eager modules get and return."""
    return any(
        module is not None
        and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )


FUSED, OWN = "fused", "own"
FOLDED = "folded"
"""The attribute of modules in which `fold` keeps its state. It is no parameter and no buffer: the network's state, so
its checkpoints and exports, stays that of its own layers."""
_RAN = "ran"
"""The attribute of modules with the forms in which they have run since `forget_forms`: a batch norm that was FUSED, a
convolution that was FOLDED, or computed by our OWN kernel."""


def _ran_as(form: str, module: nn.Module) -> None:
    vars(module).setdefault(_RAN, set()).add(form)


def ran_as(form: str, modules: Iterable[nn.Module]) -> int:
    """Return how many of the modules have run in a form since `forget_forms`."""
    return sum(form in vars(module).get(_RAN, ()) for module in modules)


def forget_forms(network: nn.Module) -> None:
    """Let `ran_as` count what runs from now on."""
    for module in network.modules():
        vars(module).get(_RAN, set()).clear()


_ATTRIBUTES: dict[type[nn.Module], tuple[str, list[float], str | None]] = {
    nn.ReLU: ("leaky_relu", [1e-30], None),
    nn.Hardswish: ("hardswish", [], None),
    nn.SiLU: ("swish", [], None),
}
"""The activations that oneDNN computes within a convolution: operator, scalars and algorithm.

Only those that keep a NaN: its `relu` and `hardtanh` turn one into 0, so that a broken teacher would seem to be sound.
The slope stands for 0: what it lets through is lost in the rounding of any sum.
"""


def fold(network: nn.Module, bf16: bool) -> None:
    """Let a trained network, in eval mode on a CPU, compute without gradients in the folded form, in bfloat16 or
    float32. Its weights must not change any more: each convolution is folded when it first runs.

    The network then gives the same bits for an image in any place of a batch of the same size, beside any others, and
    with 1, 2, 3 and 5 threads (`proofs/test_folded_rows.py`). Before the cache of teachers' outputs relies on it, a job
    tries its own network and number.
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
            with torch.no_grad(), kernels.paused():
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

    def __deepcopy__(self, _memo: object) -> _Forms:
        """Return no forms: the copy folds its own layers, and tensors in oneDNN's layout cannot be copied."""
        return _Forms(self.precision)


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
    own: Packed | None
    """The weights for our own kernel, where it is used."""
    ran: set[str]
    """The convolution's forms in which it has run."""

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
        own = kernels.packed3x3(conv, weight.float(), precision)
        weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *places, None)
        attributes = ("none", [], None) if activation is None else _ATTRIBUTES[type(activation)]
        ran = vars(conv).setdefault(_RAN, set())
        return cls(weight, bias.float(), bias.to(precision), precision, *places, attributes, own, ran)

    def __call__(self, maps_NCHW: Tensor, shortcut: Tensor | None, activation: nn.Module | None) -> Tensor:
        self.ran.add(FOLDED)
        maps = maps_NCHW.contiguous(memory_format=torch.channels_last)
        if shortcut is not None:
            shortcut = shortcut.to(self.precision).contiguous(memory_format=torch.channels_last)
        if self.own is not None and kernels.convolves(self.precision) and self.own.fits(maps):
            self.ran.add(OWN)
            relu = type(activation) is nn.ReLU
            sums = self.own(maps, self.bias, shortcut, relu)
            return sums if relu or activation is None else activation(sums)
        maps = maps.to(self.precision)
        places = self.padding, self.stride, self.dilation, self.groups
        run, (name, scalars, algorithm) = torch.ops.mkldnn._convolution_pointwise, self.activation
        if shortcut is None:
            return run(maps, self.weight, self.bias, *places, name, scalars, algorithm)
        if self.groups == 1:
            bias = self.bias_with_shortcut
            sums = run.binary(maps, shortcut, self.weight, bias, *places, "add", None, None, [], None)
        else:
            sums = run(maps, self.weight, self.bias, *places, "none", [], None) + shortcut
        # Its own `relu` behind a sum would lose a NaN, and it has no other.
        return sums.relu_() if type(activation) is nn.ReLU else sums if activation is None else activation(sums)


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
