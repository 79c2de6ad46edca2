"""3 × 3 convolutions in bfloat16 on a CPU: `conv3x3.cpp` as operators of PyTorch.

Maps are channels-last. Sums are float32 and are rounded once, after bias, shortcut and ReLU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LANES = 16
"""Numbers of output channels are multiples of it, those of input channels as well, or they are at most FEW."""
FEW = 4
NARROWEST = 3
"""The smallest width of the output. Fewer pixels share too few loads."""


@dataclass(frozen=True)
class Packed:
    """A convolution whose weights are in the order of the kernel, for maps without gradients."""

    library: ctypes.CDLL
    weight: Tensor
    """bfloat16, one-dimensional."""
    channels: int
    out_channels: int
    stride: int

    @classmethod
    def of(cls, library: ctypes.CDLL, weight: Tensor, stride: int, *, turned: bool = False) -> Packed:
        """Pack float32 weights. `turned`: for the gradient of the maps, from that of the output."""
        out_channels, channels = weight.shape[:2]
        if turned:
            out_channels, channels = channels, out_channels
        packed = torch.empty(library.conv3x3_packed(out_channels, channels), dtype=torch.bfloat16)
        library.conv3x3_pack(
            *(weight.data_ptr(), out_channels, channels, *weight.stride(), turned, packed.data_ptr()),
        )
        return cls(library, packed, channels, out_channels, stride)

    def fits(self, maps: Tensor) -> bool:
        """Return True if the kernel is for such maps."""
        return fits(maps, self.channels, self.stride)

    def __call__(
        self, maps: Tensor, bias: Tensor | None = None, shortcut: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Return relu(conv(maps) + bias + shortcut), for maps that fit and are rounded. The bias is float32, and the
        shortcut, as the result, bfloat16 and channels-last."""
        images, channels, height, width = maps.shape
        shape = images, self.out_channels, _reduced(height, self.stride), _reduced(width, self.stride)
        result = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
        self.library.conv3x3_forward(
            *(maps.data_ptr(), maps.dtype == torch.float32, images, height, width, channels),
            *(self.out_channels, self.stride, self.weight.data_ptr()),
            *(_address(bias), _address(shortcut), relu, result.data_ptr(), torch.get_num_threads()),
        )
        return result


def is_covered(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return True if the kernels are for this convolution."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.stride in {(1, 1), (2, 2)}
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.out_channels % LANES == 0
        and (conv.in_channels % LANES == 0 or conv.in_channels <= FEW)
    )


def fits(maps: Tensor, channels: int, stride: int) -> bool:
    """Return True if the kernels are for such maps: channels-last and wide enough. They may be float32 and are rounded
    then: those of few channels by the kernel, others before it."""
    return (
        # Not a subclass: neither a tensor without values nor one that records operators has an address.
        type(maps) is Tensor
        and maps.device.type == "cpu"
        and maps.dtype in {torch.float32, torch.bfloat16}
        and maps.dim() == 4
        and maps.size(1) == channels
        and maps.numel() > 0
        and _reduced(maps.size(3), stride) >= NARROWEST
        and maps.is_contiguous(memory_format=torch.channels_last)
    )


def rounded(maps: Tensor) -> Tensor:
    """Return the maps in bfloat16; few channels as they are, as the kernel rounds them itself."""
    return maps if maps.size(1) <= FEW else maps.bfloat16()


def applies(conv: nn.Module, maps: Tensor) -> bool:
    """Return True if the kernels compute conv(maps) here: under autocast to bfloat16, without hooks."""
    return (
        is_covered(conv)
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and all(type(own) is nn.Parameter and own.dtype == torch.float32 for own in conv.parameters())
        and fits(maps, conv.in_channels, conv.stride[0])
        and not any((conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks))
    )


def convolved(library: ctypes.CDLL, conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """Return conv(maps) where it applies."""
    result: Tensor = _Conv3x3.apply(rounded(maps), conv.weight, conv.bias, conv.stride[0], library)  # type: ignore[no-untyped-call]
    return result


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, library: ctypes.CDLL
    ) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.library = stride, library
        return Packed.of(library, weight, stride)(maps, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        to_maps, to_weight, to_bias, *_ = ctx.needs_input_grad
        return (
            _gradient_of_maps(ctx.library, gradient, weight, ctx.stride, maps) if to_maps else None,
            _gradient_of_weight(ctx.library, gradient, weight, ctx.stride, maps) if to_weight else None,
            gradient.sum((0, 2, 3), dtype=torch.float32) if to_bias else None,
            None,
            None,
        )


def _gradient_of_maps(library: ctypes.CDLL, gradient: Tensor, weight: Tensor, stride: int, maps: Tensor) -> Tensor:
    images, channels, height, width = maps.shape
    if channels <= FEW:
        return _by_pytorch(gradient, weight, stride, maps, (True, False))[0].to(maps.dtype)
    turned = Packed.of(library, weight, 1, turned=True)
    if stride == 1:
        return turned(gradient)
    result = torch.empty_like(maps)
    library.conv3x3_strided_gradient(
        *(gradient.data_ptr(), images, height, width, channels, weight.size(0)),
        *(turned.weight.data_ptr(), result.data_ptr(), torch.get_num_threads()),
    )
    return result


def _gradient_of_weight(library: ctypes.CDLL, gradient: Tensor, weight: Tensor, stride: int, maps: Tensor) -> Tensor:
    if maps.size(1) > FEW:
        images, channels, height, width = maps.shape
        shape, threads = (images, height, width, channels, weight.size(0), stride), torch.get_num_threads()
        partial = torch.empty(library.conv3x3_weight_room(*shape, threads))
        # As the weights of networks here: else autograd would copy it.
        result = torch.empty(weight.shape, memory_format=torch.channels_last)
        library.conv3x3_weight_gradient(
            *(maps.data_ptr(), gradient.data_ptr(), result.data_ptr()), *shape, partial.data_ptr(), threads
        )
        return result
    return _by_pytorch(gradient, weight, stride, maps, (False, True))[1].float()


def _by_pytorch(
    gradient: Tensor, weight: Tensor, stride: int, maps: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients that are wanted, of maps and weight, as autocast computes them."""
    tensors = gradient, maps.bfloat16(), weight.bfloat16()
    both = torch.ops.aten.convolution_backward(
        *tensors, None, (stride, stride), (1, 1), (1, 1), False, (0, 0), 1, (*wanted, False)
    )
    return both[0], both[1]


def _reduced(side: int, stride: int) -> int:
    return (side - 1) // stride + 1


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


ALLOWED = 1e-2
"""The largest difference from double precision, relative to the largest value: bfloat16 has 8 binary digits."""


def fault(library: ctypes.CDLL) -> str | None:
    """Compare the kernels with PyTorch in double precision, where each part of them is reached. Returns what is
    wrong."""
    for channels, out_channels, width, stride in ((3, 16, 17, 1), (16, 48, 9, 1), (48, 16, 15, 2), (16, 32, 8, 2)):
        worst = worst_error(library, channels, out_channels, width, stride)
        if not worst <= ALLOWED:  # also for a NaN
            return f"convolution is wrong: it differs by {worst:g} from {channels} to {out_channels} channels"
    return None


def worst_error(library: ctypes.CDLL, channels: int, out_channels: int, width: int, stride: int) -> float:
    """Return the largest error of outputs and gradients, relative to the largest value of each."""

    # No random numbers: the job's own must not depend on this test.
    def wave(*shape: int, step: float) -> Tensor:
        values = (torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64) * step).sin().view(shape)
        # Numbers of bfloat16, so that both sides get the same.
        return values.bfloat16().float().contiguous(memory_format=torch.channels_last)

    maps, weight = wave(2, channels, 5, width, step=0.7), wave(out_channels, channels, 3, 3, step=1.3)
    gradient = wave(2, out_channels, _reduced(5, stride), _reduced(width, stride), step=1.9)
    few = channels <= FEW
    ours = rounded(maps).requires_grad_(not few), weight.requires_grad_()
    theirs = maps.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    with torch.enable_grad():
        result = _Conv3x3.apply(*ours, None, stride, library)  # type: ignore[no-untyped-call]
        reference = torch.conv2d(theirs[0], theirs[1], None, stride, 1)
        # Products, because PyTorch imports its compiler for a gradient that is given.
        (result.double() * gradient.double()).sum().backward()
        (reference * gradient.double()).sum().backward()  # type: ignore[no-untyped-call]
    own, right = [result.detach()], [reference.detach()]
    for one, other in zip(ours[few:], theirs[few:], strict=True):
        assert one.grad is not None and other.grad is not None
        own.append(one.grad)
        right.append(other.grad)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(own, right, strict=True))
