"""Native code for the layers that take most of a step, in the place of PyTorch's operators.

`norm_relu`: batch norm in train mode, the addition of a shortcut, and ReLU, in two passes instead of six. `conv3x3`:
3 × 3 convolutions (`convolution.py`), in bfloat16 on CPUs that multiply it by AVX512_BF16, in float32 on CPUs that have
AVX2.

`enable` compiles or loads the library for this process; until then, and wherever a kernel does not apply, these
functions return None, and the caller computes with PyTorch's operators, which are also the reference in tests. The
answers agree up to rounding: in bfloat16 ours round once what several operators round several times.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kdcore.kernels import convolution
from kdcore.kernels.convolution import Packed

BLOCKS = 64
"""Parts of a reduction, as in the source: it needs room for two numbers of each part and channel."""

CODE = len("kernels-") + 8
"""Characters of the name of a library that tell its code from others, for reports."""

_library: ctypes.CDLL | None = None
_convolutions: frozenset[torch.dtype] = frozenset()
"""The precisions in which the kernels compute them."""
# Not a plain variable: a teacher's thread must not switch the student's kernels off.
_paused: ContextVar[bool] = ContextVar("kernels_paused", default=False)


@dataclass(frozen=True)
class Support:
    """Whether the kernels are used in this process, and in one line how, or why not: for log and report."""

    enabled: bool
    note: str
    convolutions: frozenset[torch.dtype] = frozenset()
    """The precisions in which the convolutions are among them."""
    code: str = ""
    """A name of the kernels' code: another one for other sources, another kind of CPU and another version of torch."""


def enable(cache: Path, convolutions: bool = True) -> Support:
    """Use the kernels from now on, if they can be had here; `cache` keeps what must be compiled. `convolutions`: those
    as well, where the CPU has what they need.

    They are compared with PyTorch first: a library that computes something else is not used.
    """
    global _library, _convolutions  # noqa: PLW0603 # one library for a process, as its OpenMP threads
    # It imports the reading of data, which networks do not need.
    from kdcore.kernels import building

    disable()
    try:
        _library = building.load(cache)
    except building.NotBuilt as error:
        return Support(False, f"eager: {error}")
    _convolutions = building.convolutions(_library) if convolutions else frozenset()
    if (fault := _fault()) is not None:
        disable()
        return Support(False, f"eager: the compiled {fault}")
    threads = "with torch's threads" if building.openmp_of_torch() else "on one thread: torch's OpenMP was not found"
    what = "fused batch norm and 3 × 3 convolutions" if _convolutions else "fused batch norm"
    code = building.entry_of(building.kind())[:CODE]
    return Support(True, f"{what} for {building.kind()}, {threads}", _convolutions, code)


def disable() -> None:
    """Compute with PyTorch's operators from now on."""
    global _library, _convolutions
    _library, _convolutions = None, frozenset()


def enabled() -> bool:
    """Return True if this thread computes with the kernels now."""
    return _library is not None and not _paused.get()


def convolves(precision: torch.dtype) -> bool:
    """Return True if this thread computes 3 × 3 convolutions in a precision with the kernels now."""
    return precision in _convolutions and enabled()


@contextmanager
def paused() -> Iterator[None]:
    """Compute with PyTorch's operators during a `with` block of this thread: they can be differentiated twice."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def conv3x3(conv: nn.Module, maps: Tensor) -> Tensor | None:
    """Return conv(maps) in the precision of autocast, or None where the caller has to compute it: not enabled or
    paused, or a convolution, maps or a precision that the kernels are not for. Shapes: N × C × H × W.

    Gradients can be taken once. The weights must be float32.
    """
    precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if not convolves(precision) or not convolution.applies(conv, maps, precision):
        return None
    assert _library is not None and isinstance(conv, nn.Conv2d)
    return convolution.convolved(_library, conv, maps, precision)


def packed3x3(conv: nn.Conv2d, weight: Tensor, precision: torch.dtype) -> Packed | None:
    """Return the convolution with weights that do not change any more (float32, of the shape of `conv.weight`), for
    maps without gradients; None where the caller has to compute it."""
    if not convolves(precision) or not convolution.is_covered(conv, precision):
        return None
    assert _library is not None
    return Packed.of(_library, weight, conv.stride[0], precision)


def norm_relu(norm: nn.BatchNorm2d, maps: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor | None:
    """Return relu(norm(maps) + shortcut), or None where the caller has to compute it. Shapes: N × C × H × W.

    Running statistics are updated as `norm` does it. None: not enabled or paused, in eval mode, not on a CPU, a layout
    other than channels-last, a dtype other than float32 and bfloat16, or hooks on `norm`. Gradients can be taken once.
    """
    if _library is None or not _applies(norm, maps) or _paused.get():
        return None
    if shortcut is not None:
        if type(shortcut) is not Tensor or shortcut.shape != maps.shape or shortcut.dtype != maps.dtype:
            return None
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    running_mean, running_var, momentum = None, None, 0.0
    if norm.track_running_stats and norm.running_mean is not None:
        running_mean, running_var = norm.running_mean, norm.running_var
        momentum = _momentum(norm)
    result: Tensor = _NormRelu.apply(  # type: ignore[no-untyped-call]
        maps, shortcut, norm.weight, norm.bias, running_mean, running_var, momentum, norm.eps, relu
    )
    return result


def _applies(norm: nn.BatchNorm2d, maps: Tensor) -> bool:
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        # Not a subclass: neither a tensor without values nor one that records operators has an address.
        and type(maps) is Tensor
        and maps.device.type == "cpu"
        and maps.dtype in {torch.float32, torch.bfloat16}
        and maps.dim() == 4
        and maps.size(1) == norm.num_features
        # One value a channel has no variance: PyTorch raises its error.
        and maps.numel() > maps.size(1)
        and maps.is_contiguous(memory_format=torch.channels_last)
        and (norm.weight is None) == (norm.bias is None)
        and all(
            own is None or (own.dtype == torch.float32 and own.is_contiguous())
            for own in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
    )


def _momentum(norm: nn.BatchNorm2d) -> float:
    """Count the batch. Returns its weight in the running statistics; without a momentum they are a plain average."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return norm.momentum or 0.0


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        shortcut: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        channels = maps.size(1)
        result = torch.empty_like(maps)
        moments_2C = torch.empty(2, channels)
        partial = torch.empty(2 * BLOCKS * channels, dtype=torch.float64)
        assert _library is not None
        _library.norm_relu_forward(
            *(maps.dtype == torch.bfloat16, maps.data_ptr(), _address(shortcut), result.data_ptr()),
            *(maps.numel() // channels, channels, _address(weight), _address(bias), eps),
            *(moments_2C.data_ptr(), moments_2C[1].data_ptr(), _address(running_mean), _address(running_var), momentum),
            *(relu, partial.data_ptr(), torch.get_num_threads()),
        )
        ctx.library, ctx.has_shortcut = _library, shortcut is not None
        ctx.save_for_backward(maps, result if relu else None, weight, moments_2C)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, result, weight, moments_2C = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        channels = maps.size(1)
        to_maps = torch.empty_like(maps) if ctx.needs_input_grad[0] else None
        # Without a ReLU the gradient passes through the addition as it is.
        to_shortcut = gradient if ctx.has_shortcut and ctx.needs_input_grad[1] else None
        masked = torch.empty_like(maps) if to_shortcut is not None and result is not None else None
        of_parameters_2C = torch.empty(2, channels)
        partial = torch.empty(2 * BLOCKS * channels, dtype=torch.float64)
        ctx.library.norm_relu_backward(
            *(maps.dtype == torch.bfloat16, maps.data_ptr(), _address(result), gradient.data_ptr()),
            *(maps.numel() // channels, channels, _address(weight), moments_2C.data_ptr(), moments_2C[1].data_ptr()),
            *(_address(to_maps), _address(masked), of_parameters_2C.data_ptr(), of_parameters_2C[1].data_ptr()),
            *(partial.data_ptr(), torch.get_num_threads()),
        )
        to_shortcut = to_shortcut if masked is None else masked
        to_weight, to_bias = of_parameters_2C if weight is not None else (None, None)
        return to_maps, to_shortcut, to_weight, to_bias, None, None, None, None, None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fault() -> str | None:
    """Compare the library with PyTorch in double precision on small tensors that reach every group of channels. Returns
    what is wrong."""
    threads = torch.get_num_threads()
    # On a busy machine, threads that wait for each other would make a second of these milliseconds.
    torch.set_num_threads(1)
    try:
        for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
            for channels in (3, 5, 93):
                worst = worst_error(channels, dtype)
                if not worst <= allowed:  # also for a NaN
                    return f"batch norm is wrong: {dtype} differs by {worst:g} at {channels} channels"
        for precision in _convolutions:
            assert _library is not None
            if (fault := convolution.fault(_library, precision)) is not None:
                return fault
    finally:
        torch.set_num_threads(threads)
    return None


def worst_error(channels: int, dtype: torch.dtype) -> float:
    """Return the largest error of outputs and gradients, relative to the largest value of each."""
    # No random numbers: the job's own must not depend on this test.
    wave = torch.arange(3 * 8 * 8 * channels, dtype=torch.float64).view(3, 8, 8, channels).permute(0, 3, 1, 2)
    maps, shortcut, gradient = ((wave * step).sin().mul(2).add(1).to(dtype) for step in (0.7, 1.3, 1.9))
    norm = nn.BatchNorm2d(channels)
    norm.weight.data = 1 + wave[0, :, 0, 0].float().cos() / 2
    norm.bias.data = wave[0, :, 0, 1].float().sin()
    ours = [maps, shortcut, norm.weight.detach(), norm.bias.detach()]
    theirs = [one.double().requires_grad_() for one in ours]
    ours = [maps.requires_grad_(), shortcut.requires_grad_(), norm.weight, norm.bias]
    with torch.enable_grad():
        result = norm_relu(norm, maps, shortcut)
        if result is None:
            return float("nan")
        normal = F.batch_norm(theirs[0], None, None, theirs[2], theirs[3], training=True, eps=norm.eps)
        # The same side of zero: a value that is rounded to the other side would have another gradient.
        reference = (normal + theirs[1]) * (result > 0)
        # Products, because PyTorch imports its compiler for a gradient that is given.
        (result.double() * gradient.double()).sum().backward()  # type: ignore[no-untyped-call]
        (reference * gradient.double()).sum().backward()  # type: ignore[no-untyped-call]
    own, right = [result.detach()], [reference.detach()]
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        own.append(one.grad)
        right.append(other.grad)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(own, right, strict=True))
