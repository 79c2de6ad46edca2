"""The fused batch norm against PyTorch's operators, values computed by hand, and finite differences."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore import kernels

SHAPES = [(4, 16, 8, 8), (2, 64, 5, 5), (3, 17, 7, 5), (5, 3, 4, 4), (2, 5, 3, 3), (2, 1, 3, 3), (2, 80, 1, 1)]
ROWS = [(2, 8, 1, 1), (127, 4, 1, 1), (128, 4, 1, 1), (129, 4, 1, 1), (65 * 128 + 1, 2, 1, 1)]
"""Around a chunk of 128 rows, and more chunks than there are blocks."""


@pytest.fixture(autouse=True)
def enabled(compiled: Path) -> Iterator[None]:
    assert kernels.enable(compiled).enabled
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    kernels.disable()


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, **options: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options)
    generator = torch.Generator().manual_seed(channels)
    if norm.affine:
        norm.weight.data = torch.rand(channels, generator=generator) + 0.5
        norm.bias.data = torch.randn(channels, generator=generator)
    return norm


def eager(norm: nn.BatchNorm2d, maps: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    result: Tensor = norm(maps)
    result = result if shortcut is None else result + shortcut
    return F.relu(result) if relu else result


def exact(norm: nn.BatchNorm2d, maps: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    return eager(norm.double(), maps.double(), None if shortcut is None else shortcut.double(), relu)


def fused(norm: nn.BatchNorm2d, maps: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
    result = kernels.norm_relu(norm, maps, shortcut, relu=relu)
    assert result is not None
    return result


def everything(
    compute: Any, shape: tuple[int, ...], with_shortcut: bool, relu: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Return the output, the gradients of maps, weight, bias and shortcut, and the running statistics."""
    norm = norm_of(shape[1])
    maps, gradient = random(shape, 1, dtype).requires_grad_(), random(shape, 3, dtype)
    shortcut = random(shape, 2, dtype).requires_grad_() if with_shortcut else None
    result = compute(norm, maps, shortcut, relu)
    result.backward(gradient)
    assert norm.running_mean is not None and norm.running_var is not None
    found = [result.detach(), maps.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    return [one for one in [*found, None if shortcut is None else shortcut.grad] if one is not None]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "plain"])
@pytest.mark.parametrize("with_shortcut", [True, False], ids=["shortcut", "alone"])
@pytest.mark.parametrize("shape", [*SHAPES, *ROWS], ids=str)
def test_norm_relu_agrees_with_eager_in_float32(shape: tuple[int, ...], with_shortcut: bool, relu: bool) -> None:
    ours = everything(fused, shape, with_shortcut, relu, torch.float32)
    for reference in (eager, exact):
        theirs = everything(reference, shape, with_shortcut, relu, torch.float32)
        # Sums of many values of both signs are smaller than what was added.
        size = max(1.0, shape[0] ** 0.5, *(float(other.abs().max()) for other in theirs))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=2e-6 * size)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("with_shortcut", [True, False], ids=["shortcut", "alone"])
@pytest.mark.parametrize("shape", [(8, 16, 8, 8), (8, 67, 4, 4), (8, 3, 8, 8)], ids=str)
def test_norm_relu_in_bfloat16_is_no_further_from_float64_than_eager(
    shape: tuple[int, ...], with_shortcut: bool
) -> None:
    # Without a ReLU, because eager's rounded values fall on another side of zero.
    three = (everything(compute, shape, with_shortcut, False, torch.bfloat16) for compute in (fused, eager, exact))
    for ours, theirs, reference in zip(*three, strict=True):
        right = reference.double()
        # The last summand is the rounding of the reference, whose gradients are bfloat16 as well.
        assert (ours - right).norm() <= 1.01 * (theirs - right).norm() + 1e-6 * right.norm()


def test_norm_relu_in_bfloat16_rounds_the_exact_value_once() -> None:
    norm, maps, shortcut = (
        norm_of(16),
        random((4, 16, 8, 8), 1, torch.bfloat16),
        random((4, 16, 8, 8), 2, torch.bfloat16),
    )
    right = eager(norm_of(16).double(), maps.double(), shortcut.double(), True)
    ours = fused(norm, maps, shortcut)
    assert ours.dtype == torch.bfloat16
    # Half of the last of 8 binary digits, and what float32 adds to it.
    assert ((ours.double() - right).abs() <= right.abs() * (2**-8 * 1.001) + 1e-6).all()


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def test_norm_relu_of_two_values_computed_by_hand() -> None:
    norm = nn.BatchNorm2d(1, eps=0.0, momentum=0.5)
    norm.weight.data, norm.bias.data = torch.tensor([2.0]), torch.tensor([1.0])
    maps, shortcut = column(1, 3).requires_grad_(), column(0.5, 0.5).requires_grad_()
    result = fused(norm, maps, shortcut)
    # Mean 2, variance 1: normalised -1 and 1, times 2 plus 1 is -1 and 3.
    assert result.flatten().tolist() == [0.0, 3.5]
    result.backward(column(5, 7))
    assert shortcut.grad is not None and shortcut.grad.flatten().tolist() == [0.0, 7.0]
    assert norm.weight.grad is not None and norm.weight.grad.tolist() == [7.0]
    assert norm.bias.grad is not None and norm.bias.grad.tolist() == [7.0]
    # Two normalised values are always -1 and 1.
    assert maps.grad is not None and maps.grad.flatten().tolist() == [0.0, 0.0]
    assert norm.running_mean is not None and norm.running_mean.tolist() == [1.0]
    # Half of 1, which it was, and half of the unbiased 2.
    assert norm.running_var is not None and norm.running_var.tolist() == [1.5]


def test_norm_relu_passes_a_gradient_computed_by_hand() -> None:
    norm = nn.BatchNorm2d(1, eps=0.0)
    norm.weight.data = torch.tensor([2.0])
    maps = column(1, 1, 3, 3).requires_grad_()
    fused(norm, maps, relu=False).backward(column(1, 0, 0, 0))
    # Its mean is 1/4, its mean product with the normalised values is -1/4: twice 1 - 1/4 - 1/4, 0 - 1/4 - 1/4, 0 and 0.
    assert maps.grad is not None and maps.grad.flatten().tolist() == [1.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("relu", [True, False])
def test_norm_relu_has_the_gradient_of_finite_differences(relu: bool) -> None:
    shape, step = (3, 6, 4, 4), 1e-2
    maps, shortcut, direction, weights = (random(shape, seed) for seed in range(4))
    norm = norm_of(6)
    # So far from zero that no value crosses it.
    shortcut = shortcut + torch.where(norm(maps) + shortcut > 0, 1.0, -1.0)
    ours = maps.clone().requires_grad_()
    (fused(norm, ours, shortcut, relu) * weights).sum().backward()

    def value(at: Tensor) -> float:
        return float((fused(norm, at, shortcut, relu) * weights).detach().double().sum())

    slope = (value(maps + step * direction) - value(maps - step * direction)) / (2 * step)
    assert ours.grad is not None
    assert float((ours.grad * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 16, 16, 16), (300, 67, 1, 1)], ids=str)
def test_norm_relu_has_the_same_bits_for_every_number_of_threads(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(everything(fused, shape, True, True, dtype))
    assert math.prod(shape) > 2**14  # smaller ones use one thread
    assert all(torch.equal(one, other) for again in found[1:] for one, other in zip(found[0], again, strict=True))


def test_norm_relu_keeps_its_digits_beside_a_large_mean() -> None:
    maps, norm = random((4, 16, 8, 8), 1) + 1e4, norm_of(16, momentum=1.0)
    fused(norm, maps, relu=False)
    assert norm.running_var is not None
    right = maps.double().var(dim=(0, 2, 3))
    assert ((norm.running_var.double() - right).abs() / right).max() < 2e-4  # a mean has an error of 1e-3, in float32


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3}, {"momentum": 0.0}], ids=str)
def test_norm_relu_updates_running_statistics_as_pytorch(options: dict[str, Any]) -> None:
    ours, theirs = norm_of(16, **options), norm_of(16, **options)
    for seed in range(3):
        fused(ours, random((2, 16, 4, 4), seed))
        theirs(random((2, 16, 4, 4), seed))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_norm_relu_without_parameters_or_running_statistics() -> None:
    maps = random((2, 16, 4, 4), 1)
    plain, untracked = norm_of(16, affine=False), norm_of(16, track_running_stats=False)
    torch.testing.assert_close(fused(plain, maps), F.relu(norm_of(16, affine=False)(maps)))
    torch.testing.assert_close(fused(untracked, maps), F.relu(untracked(maps)))
    tracked = norm_of(16)
    tracked.track_running_stats = False
    fused(tracked, maps)
    assert tracked.running_mean is not None and not tracked.running_mean.any() and tracked.num_batches_tracked == 0


def test_norm_relu_computes_only_the_gradients_that_are_needed() -> None:
    norm, shortcut = norm_of(16), random((2, 16, 4, 4), 2).requires_grad_()
    fused(norm, random((2, 16, 4, 4), 1), shortcut).sum().backward()
    assert norm.weight.grad is not None and shortcut.grad is not None
    frozen = norm_of(16).requires_grad_(False)
    maps = random((2, 16, 4, 4), 1).requires_grad_()
    fused(frozen, maps, random((2, 16, 4, 4), 2)).square().sum().backward()
    assert frozen.weight.grad is None and maps.grad is not None
    with torch.no_grad():
        assert not fused(norm, maps).requires_grad


def test_norm_relu_accepts_a_gradient_and_a_shortcut_of_another_layout() -> None:
    shape = (2, 16, 4, 4)
    ours, theirs = random(shape, 1).requires_grad_(), random(shape, 1).requires_grad_()
    shortcut = random(shape, 2).contiguous()
    fused(norm_of(16), ours, shortcut).backward(random(shape, 3).contiguous())
    eager(norm_of(16), theirs, shortcut, True).backward(random(shape, 3))
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_norm_relu_lets_nan_through() -> None:
    maps = random((2, 16, 4, 4), 1, torch.bfloat16)
    maps[0, 3, 0, 0] = math.nan
    assert fused(norm_of(16), maps).isnan().any(dim=3).any(dim=2).any(dim=0).nonzero().flatten().tolist() == [3]


def test_norm_relu_refuses_to_be_differentiated_twice() -> None:
    maps = random((2, 16, 4, 4), 1).requires_grad_()
    (gradient,) = torch.autograd.grad(fused(norm_of(16), maps).square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_norm_relu_is_eager_inside_paused_and_after_disable() -> None:
    norm, maps = norm_of(16), random((2, 16, 4, 4), 1)
    with kernels.paused():
        assert kernels.norm_relu(norm, maps) is None
    assert kernels.norm_relu(norm, maps) is not None
    kernels.disable()
    assert kernels.norm_relu(norm, maps) is None


def with_other(norm: nn.BatchNorm2d, **tensors: torch.Tensor | None) -> nn.BatchNorm2d:
    for name, tensor in tensors.items():
        setattr(norm, name, tensor)
    return norm


@pytest.mark.parametrize(
    ("reason", "arguments"),
    [
        ("eval mode", lambda norm, maps: (norm.eval(), maps)),
        ("a subclass", lambda norm, maps: (nn.SyncBatchNorm(16), maps)),
        ("float64", lambda norm, maps: (norm, maps.double())),
        ("the layout N × C × H × W", lambda norm, maps: (norm, maps.contiguous())),
        ("no values", lambda norm, maps: (norm, maps.to("meta"))),
        ("one value a channel", lambda norm, maps: (norm, maps[:1, :, :1, :1])),
        ("no images", lambda norm, maps: (norm, maps[:0])),
        ("other channels", lambda norm, maps: (nn.BatchNorm2d(8), maps)),
        ("parameters in bfloat16", lambda norm, maps: (norm.bfloat16(), maps)),
        (
            "a running variance in float64",
            lambda norm, maps: (with_other(norm, running_var=torch.ones(16).double()), maps),
        ),
        ("running means with gaps", lambda norm, maps: (with_other(norm, running_mean=torch.zeros(32)[::2]), maps)),
        ("a weight without a bias", lambda norm, maps: (with_other(norm, bias=None), maps)),
        ("a bias without a weight", lambda norm, maps: (with_other(norm, weight=None), maps)),
        ("a shortcut of another shape", lambda norm, maps: (norm, maps, maps[:, :, :1])),
        ("a shortcut of another dtype", lambda norm, maps: (norm, maps, maps.bfloat16())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_norm_relu_is_none_for(reason: str, arguments: Any) -> None:
    norm = norm_of(16)
    assert kernels.norm_relu(*arguments(norm, random((2, 16, 4, 4), 1))) is None
    assert norm.num_batches_tracked == 0


def test_norm_relu_is_none_for_a_norm_with_a_hook() -> None:
    norm = norm_of(16)
    norm.register_forward_hook(lambda *_: None)
    assert kernels.norm_relu(norm, random((2, 16, 4, 4), 1)) is None
