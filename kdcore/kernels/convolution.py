"""3 × 3 convolutions on a CPU as operators of PyTorch: in bfloat16 by `conv3x3.cpp` and `conv3x3_weight.cpp`, in
float32 with stride 1 by `winograd.cpp`.

Maps are channels-last. Sums are float32; in bfloat16 they are rounded once, after bias, shortcut and ReLU.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LANES = 16
"""Numbers of output channels are multiples of it, those of input channels as well; or in bfloat16 at most FEW."""
FEW = 4
NARROWEST = 3
"""The smallest width of the output in bfloat16. Fewer pixels share too few loads."""
LARGEST_SUMS = 128 * 128
"""Of input by output channels, for the gradient of the weight in float32: more sums than that leave the cache."""
TILE = 4
"""Pixels of a side of Winograd's tiles."""
FEWEST_TILES = 32
"""For a learner in float32: its weights are brought into Winograd's form at each step. Without gradients there is no
such limit: a row's bits must not depend on the number of rows beside it."""


@dataclass(frozen=True)
class Packed:
    """A convolution whose weights are in the form of the kernel, for maps without gradients."""

    library: ctypes.CDLL
    weight: Tensor
    """One-dimensional, in the precision that the convolution computes in."""
    channels: int
    out_channels: int
    stride: int

    @classmethod
    def of(
        cls, library: ctypes.CDLL, weight: Tensor, stride: int, precision: torch.dtype, *, turned: bool = False
    ) -> Packed:
        """Pack float32 weights. `turned`: for the gradient of the maps, from that of the output."""
        out_channels, channels = weight.shape[:2]
        if turned:
            out_channels, channels = channels, out_channels
        in_bf16 = precision == torch.bfloat16
        room, pack = (
            (library.conv3x3_packed, library.conv3x3_pack)
            if in_bf16
            else (library.winograd_packed, library.winograd_pack)
        )
        packed = torch.empty(room(out_channels, channels), dtype=precision)
        pack(weight.data_ptr(), out_channels, channels, *weight.stride(), turned, packed.data_ptr())
        return cls(library, packed, channels, out_channels, stride)

    def fits(self, maps: Tensor) -> bool:
        """Return True if the kernel is for such maps."""
        return fits(maps, self.channels, self.stride, self.weight.dtype)

    def __call__(
        self, maps: Tensor, bias: Tensor | None = None, shortcut: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """Return relu(conv(maps) + bias + shortcut), for maps that fit. The bias is float32; the shortcut is
        channels-last and in the convolution's precision, as the result."""
        maps = rounded(maps, self.weight.dtype)
        images, channels, height, width = maps.shape
        shape = images, self.out_channels, _reduced(height, self.stride), _reduced(width, self.stride)
        result = torch.empty(shape, dtype=self.weight.dtype, memory_format=torch.channels_last)
        finish = _address(bias), _address(shortcut), relu, result.data_ptr(), torch.get_num_threads()
        weight = self.weight.data_ptr()
        if self.weight.dtype == torch.bfloat16:
            self.library.conv3x3_forward(
                *(maps.data_ptr(), maps.dtype == torch.float32, images, height, width, channels),
                *(self.out_channels, self.stride, weight, *finish),
            )
        else:
            of_maps = maps.data_ptr(), images, height, width, channels
            self.library.winograd_forward(*of_maps, self.out_channels, weight, *finish)
        return result


def is_covered(conv: nn.Module, precision: torch.dtype) -> TypeGuard[nn.Conv2d]:
    """Return True if the kernels are for this convolution."""
    in_bf16 = precision == torch.bfloat16
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and (conv.stride == (1, 1) or (in_bf16 and conv.stride == (2, 2)))
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.out_channels % LANES == 0
        and (conv.in_channels % LANES == 0 or (in_bf16 and conv.in_channels <= FEW))
    )


def fits(maps: Tensor, channels: int, stride: int, precision: torch.dtype) -> bool:
    """Return True if the kernels are for such maps: channels-last and wide enough. For bfloat16 they may be float32 and
    are rounded then: those of few channels by the kernel, others before it."""
    return (
        # Not a subclass: neither a tensor without values nor one that records operators has an address.
        type(maps) is Tensor
        and maps.device.type == "cpu"
        and maps.dtype in {torch.float32, precision}
        and maps.dim() == 4
        and maps.size(1) == channels
        and maps.numel() > 0
        and (precision == torch.float32 or _reduced(maps.size(3), stride) >= NARROWEST)
        and maps.is_contiguous(memory_format=torch.channels_last)
    )


def rounded(maps: Tensor, precision: torch.dtype) -> Tensor:
    """Return the maps in a precision; few channels as they are, as the kernel rounds them itself."""
    return maps if maps.size(1) <= FEW else maps.to(precision)


def applies(conv: nn.Module, maps: Tensor, precision: torch.dtype) -> bool:
    """Return True if the kernels compute conv(maps) in a precision, without hooks."""
    return (
        is_covered(conv, precision)
        and all(type(own) is nn.Parameter and own.dtype == torch.float32 for own in conv.parameters())
        and fits(maps, conv.in_channels, conv.stride[0], precision)
        and (precision == torch.bfloat16 or not torch.is_grad_enabled() or _tiles(maps) >= FEWEST_TILES)
        and not any((conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks))
    )


def convolved(library: ctypes.CDLL, conv: nn.Conv2d, maps: Tensor, precision: torch.dtype) -> Tensor:
    """Return conv(maps) where it applies."""
    result: Tensor = _Conv3x3.apply(  # type: ignore[no-untyped-call]
        rounded(maps, precision), conv.weight, conv.bias, conv.stride[0], precision, library
    )
    return result


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        precision: torch.dtype,
        library: ctypes.CDLL,
    ) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.library = stride, library
        return Packed.of(library, weight, stride, precision)(maps, bias)

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
            None,
        )


def _gradient_of_maps(library: ctypes.CDLL, gradient: Tensor, weight: Tensor, stride: int, maps: Tensor) -> Tensor:
    images, channels, height, width = maps.shape
    if channels <= FEW:
        return _by_pytorch(gradient, weight, stride, maps, (True, False))[0].to(maps.dtype)
    turned = Packed.of(library, weight, 1, gradient.dtype, turned=True)
    if stride == 1:
        return turned(gradient)
    result = torch.empty_like(maps)
    library.conv3x3_strided_gradient(
        *(gradient.data_ptr(), images, height, width, channels, weight.size(0)),
        *(turned.weight.data_ptr(), result.data_ptr(), torch.get_num_threads()),
    )
    return result


def _gradient_of_weight(library: ctypes.CDLL, gradient: Tensor, weight: Tensor, stride: int, maps: Tensor) -> Tensor:
    images, channels, height, width = maps.shape
    in_bf16 = gradient.dtype == torch.bfloat16
    if channels <= FEW if in_bf16 else channels * weight.size(0) > LARGEST_SUMS:
        return _by_pytorch(gradient, weight, stride, maps, (False, True))[1].float()
    shape, threads = (images, height, width, channels, weight.size(0)), torch.get_num_threads()
    # As the weights of networks here: else autograd would copy it.
    result = torch.empty(weight.shape, memory_format=torch.channels_last)
    of_maps = maps.data_ptr(), gradient.data_ptr(), result.data_ptr()
    if in_bf16:
        partial = torch.empty(library.conv3x3_weight_room(*shape, stride, threads))
        library.conv3x3_weight_gradient(*of_maps, *shape, stride, partial.data_ptr(), threads)
    else:
        partial = torch.empty(library.winograd_weight_room(*shape))
        library.winograd_weight_gradient(*of_maps, *shape, partial.data_ptr(), threads)
    return result


def _by_pytorch(
    gradient: Tensor, weight: Tensor, stride: int, maps: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients that are wanted, of maps and weight, in the precision of that of the output."""
    tensors = gradient, maps.to(gradient.dtype), weight.to(gradient.dtype)
    both = torch.ops.aten.convolution_backward(
        *tensors, None, (stride, stride), (1, 1), (1, 1), False, (0, 0), 1, (*wanted, False)
    )
    return both[0], both[1]


def _tiles(maps: Tensor) -> int:
    return maps.size(0) * _reduced(maps.size(2), TILE) * _reduced(maps.size(3), TILE)


def _reduced(side: int, stride: int) -> int:
    return (side - 1) // stride + 1


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""The largest difference from double precision, relative to the largest value: bfloat16 has 8 binary digits."""
TRIED = {
    torch.bfloat16: ((3, 16, 17, 1), (16, 48, 9, 1), (48, 16, 15, 2), (16, 32, 8, 2)),
    torch.float32: ((16, 48, 9, 1), (48, 16, 8, 1)),
}
"""Channels, output channels, width and stride that reach each part of the kernels."""


def fault(library: ctypes.CDLL, precision: torch.dtype) -> str | None:
    """Compare the kernels with PyTorch in double precision. Returns what is wrong."""
    for channels, out_channels, width, stride in TRIED[precision]:
        worst = worst_error(library, channels, out_channels, width, stride, precision)
        if not worst <= ALLOWED[precision]:  # also for a NaN
            return f"convolution is wrong: it differs by {worst:g} from {channels} to {out_channels} channels"
    return None


def worst_error(
    library: ctypes.CDLL, channels: int, out_channels: int, width: int, stride: int, precision: torch.dtype
) -> float:
    """Return the largest error of outputs and gradients, relative to the largest value of each."""

    # No random numbers: the job's own must not depend on this test.
    def wave(*shape: int, step: float) -> Tensor:
        values = (torch.arange(float(torch.Size(shape).numel()), dtype=torch.float64) * step).sin().view(shape)
        # Numbers of bfloat16, so that both sides get the same.
        return values.bfloat16().float().contiguous(memory_format=torch.channels_last)

    maps, weight = wave(2, channels, 5, width, step=0.7), wave(out_channels, channels, 3, 3, step=1.3)
    gradient = wave(2, out_channels, _reduced(5, stride), _reduced(width, stride), step=1.9)
    few = channels <= FEW
    ours = rounded(maps, precision).requires_grad_(not few), weight.requires_grad_()
    theirs = maps.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    with torch.enable_grad():
        result = _Conv3x3.apply(*ours, None, stride, precision, library)  # type: ignore[no-untyped-call]
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
