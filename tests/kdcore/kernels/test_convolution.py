"""Our own 3 × 3 convolutions against PyTorch's in double precision, and values computed by hand."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kdcore import kernels
from kdcore.kernels import convolution

SIDES = [(8, 8), (3, 3), (5, 6), (4, 10), (3, 12), (5, 16), (3, 32), (7, 7), (9, 11), (1, 14), (6, 5), (4, 28), (2, 33)]
"""Blocks of 3 to 16 pixels, a last one that begins earlier, edges in one block and in two, odd numbers of rows."""
PLACES = [(side, stride) for side in SIDES for stride in (1, 2) if (side[1] - 1) // stride + 1 >= convolution.NARROWEST]
CHANNELS = [(16, 16), (32, 16), (16, 32), (48, 80), (64, 64)]


pytestmark = pytest.mark.usefixtures("own_convolutions")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def layer(channels: int, out_channels: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=bias)
    generator = torch.Generator().manual_seed(channels + out_channels)
    conv.weight.data = torch.randn(conv.weight.shape, generator=generator) / (3 * channels**0.5)
    if conv.bias is not None:
        conv.bias.data = torch.randn(out_channels, generator=generator)
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def convolved(conv: nn.Module, maps: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        result = kernels.conv3x3(conv, maps)
    assert result is not None
    return result


def exact(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    """The convolution of the rounded numbers in double precision."""
    weight = conv.weight.detach().bfloat16().double()
    bias = None if conv.bias is None else conv.bias.detach().double()
    return torch.conv2d(maps.detach().bfloat16().double(), weight, bias, conv.stride, 1)


def assert_rounded_once(found: Tensor, right: Tensor) -> None:
    """Half of the last of 8 binary digits, and what float32 adds to it."""
    assert found.dtype == torch.bfloat16 and found.is_contiguous(memory_format=torch.channels_last)
    assert ((found.double() - right).abs() <= right.abs() * (2**-8 * 1.001) + 1e-5).all()


@pytest.mark.parametrize(("channels", "out_channels"), CHANNELS)
@pytest.mark.parametrize(("side", "stride"), PLACES, ids=str)
def test_conv3x3_rounds_the_exact_value_once_and_has_its_gradients(
    side: tuple[int, int], channels: int, out_channels: int, stride: int
) -> None:
    conv, maps = layer(channels, out_channels, stride), random(3, channels, *side).requires_grad_()
    result = convolved(conv, maps)
    assert_rounded_once(result.detach(), exact(conv, maps))
    gradient = random(*result.shape, seed=2)
    result.backward(gradient)
    to_maps, to_weight, _ = torch.ops.aten.convolution_backward(
        *(gradient.double(), maps.detach().double(), conv.weight.detach().bfloat16().double(), None, conv.stride),
        *((1, 1), (1, 1), False, (0, 0), 1, (True, True, False)),
    )
    assert maps.grad is not None and conv.weight.grad is not None
    assert_rounded_once(maps.grad, to_maps)
    torch.testing.assert_close(conv.weight.grad.double(), to_weight, rtol=1e-4, atol=1e-4)
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv3x3_images_of_few_channels(channels: int, stride: int, dtype: torch.dtype) -> None:
    conv, images = layer(channels, 16, stride), random(3, channels, 9, 13, dtype=dtype).requires_grad_()
    result = convolved(conv, images)
    assert_rounded_once(result.detach(), exact(conv, images))
    result.sum().backward()
    right = images.detach().double().requires_grad_()
    weight = conv.weight.detach().bfloat16().double().requires_grad_()
    torch.conv2d(right, weight, None, stride, 1).sum().backward()
    for found, expected in ((images.grad, right.grad), (conv.weight.grad, weight.grad)):
        assert found is not None and expected is not None
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.01


def test_conv3x3_of_ones_counts_the_pixels_under_the_kernel() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    conv.weight.data.fill_(1)
    conv.bias.data = torch.arange(16.0)  # type: ignore[union-attr]
    maps = torch.ones(1, 16, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    result = convolved(conv, maps)
    counts = [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]
    assert result[0, 0].tolist() == [[16 * count for count in row] for row in counts]
    assert result[0, 5, 1].tolist() == [16 * count + 5 for count in counts[1]]
    result.sum().backward()
    assert maps.grad is not None and maps.grad[0, 0].tolist() == result[0, 0].tolist()
    assert conv.bias.grad is not None and conv.bias.grad.tolist() == [12] * 16  # type: ignore[union-attr]
    assert conv.weight.grad is not None and conv.weight.grad[3, 7].tolist() == [[6, 8, 6], [9, 12, 9], [6, 8, 6]]


def test_conv3x3_one_pixel_meets_each_tap_where_it_is() -> None:
    """The gradient of an output pixel is the kernel, turned by nothing, about the pixel that it is at."""
    conv = nn.Conv2d(16, 16, 3, 2, 1, bias=False)
    conv.weight.data.zero_()
    conv.weight.data[2, 3] = torch.arange(1.0, 10).view(3, 3)
    maps = torch.zeros(1, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    convolved(conv, maps)[0, 2, 1, 2].backward()
    assert maps.grad is not None and maps.grad[0, 3, 1:4, 3:6].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert maps.grad.abs().sum() == 45
    with torch.no_grad():
        maps[0, 3, 3, 5] = 1
    assert convolved(conv, maps)[0, 2].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_reaches_its_neighbours_and_nobody_else(value: float) -> None:
    conv, maps = layer(16, 32), random(2, 16, 6, 16)
    maps[1, 4, 2, 9] = value
    packed = kernels.packed3x3(conv, conv.weight.detach(), torch.bfloat16)
    assert packed is not None
    broken = torch.zeros(2, 32, 6, 16, dtype=torch.bool)
    broken[1, :, 1:4, 8:11] = True
    assert torch.equal(convolved(conv, maps).isfinite(), ~broken)
    passed = packed(maps, relu=True)
    assert bool(passed[~broken].isfinite().all()) and torch.equal(passed.isnan(), packed(maps).isnan())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [16, 3])
def test_packed_adds_bias_and_shortcut_and_rectifies_before_it_rounds(channels: int, stride: int) -> None:
    conv, maps = layer(channels, 48, stride, bias=True), random(2, channels, 8, 16)
    packed = kernels.packed3x3(conv, conv.weight.detach(), torch.bfloat16)
    assert packed is not None and packed.fits(maps) and conv.bias is not None
    right = exact(conv, maps)
    shortcut = random(*right.shape, seed=5)
    assert_rounded_once(packed(maps, conv.bias.detach()), right)
    assert_rounded_once(packed(maps, conv.bias.detach(), shortcut), right + shortcut)
    assert_rounded_once(packed(maps, conv.bias.detach(), shortcut, relu=True), (right + shortcut).relu())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [16, 3])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_with_any_number_of_threads(channels: int, stride: int) -> None:
    conv, maps = layer(channels, 64, stride), random(7, channels, 33, 32)

    def everything(rows: Tensor, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        rows = rows.clone().requires_grad_()
        result = convolved(conv, rows)
        conv.zero_grad()
        result.backward(result.detach().clone())
        assert rows.grad is not None and conv.weight.grad is not None
        return [result.detach(), rows.grad, conv.weight.grad]

    once = everything(maps, 1)
    for threads in (1, 2, 3):
        assert all(torch.equal(*both) for both in zip(once, everything(maps, threads), strict=True))
    for row in range(7):
        alone = everything(maps[row : row + 1].contiguous(memory_format=torch.channels_last), 2)
        assert torch.equal(alone[0][0], once[0][row]) and (channels == 3 or torch.equal(alone[1][0], once[1][row]))


def test_conv3x3_computes_only_the_gradients_that_are_needed() -> None:
    conv, maps = layer(16, 16), random(2, 16, 8, 8)
    convolved(conv, maps).sum().backward()
    assert conv.weight.grad is not None
    conv = layer(16, 16).requires_grad_(False)
    maps.requires_grad_()
    convolved(conv, maps).sum().backward()
    assert maps.grad is not None and conv.weight.grad is None
    with torch.no_grad():
        assert not convolved(layer(16, 16), maps).requires_grad


def test_conv3x3_maps_in_float32_get_their_gradient_in_float32() -> None:
    maps = random(2, 16, 8, 8, dtype=torch.float32).requires_grad_()
    result = convolved(layer(16, 16), maps)
    assert_rounded_once(result.detach(), exact(layer(16, 16), maps))
    result.sum().backward()
    assert maps.grad is not None and maps.grad.dtype == torch.float32


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(lambda *_: None)
    return conv


class Subclass(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(16, 16, 1),
        lambda: nn.Conv2d(16, 16, 3),
        lambda: nn.Conv2d(16, 16, 3, padding="same"),
        lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(16, 16, 3, padding=1, stride=(1, 2)),
        lambda: nn.Conv2d(16, 16, 3, padding=1, stride=3),
        lambda: nn.Conv2d(16, 16, 3, padding=1, dilation=2),
        lambda: nn.Conv2d(16, 16, 3, padding=1, groups=2),
        lambda: nn.Conv2d(16, 17, 3, padding=1),
        lambda: nn.Conv2d(17, 16, 3, padding=1),
        lambda: nn.Conv2d(16, 16, 3, padding=1).double(),
        lambda: Subclass(16, 16, 3, padding=1),
        lambda: nn.ConvTranspose2d(16, 16, 3, padding=1),
        lambda: hooked(nn.Conv2d(16, 16, 3, padding=1)),
    ],
)  # fmt: skip
def test_conv3x3_leaves_other_layers_to_the_caller(conv: Callable[[], nn.Module]) -> None:
    of = conv()
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.conv3x3(of, random(2, getattr(of, "in_channels", 16), 8, 8)) is None


@pytest.mark.parametrize(
    "maps",
    [
        random(2, 16, 8, 8).contiguous(),
        random(2, 16, 8, 2),
        random(2, 16, 8, 8).double(),
        random(2, 32, 8, 8),
        random(2, 16, 8, 8)[:, :, :, ::2],
        random(0, 16, 8, 8),
        random(1, 16, 8, 8)[0],
        torch.nn.Parameter(random(2, 16, 8, 8)),
    ],
    ids=["layout", "narrow", "double", "channels", "strides", "empty", "dimensions", "subclass"],
)
def test_conv3x3_leaves_other_maps_to_the_caller(maps: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.conv3x3(layer(16, 16), maps) is None


def test_conv3x3_is_for_autocast_to_bfloat16_while_it_is_enabled(compiled: Path) -> None:
    conv, maps = layer(16, 16), random(2, 16, 8, 8)
    assert kernels.conv3x3(conv, maps) is None
    with torch.autocast("cpu", torch.float16):
        assert kernels.conv3x3(conv, maps) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.conv3x3(conv, maps) is not None
        with kernels.paused():
            assert (
                kernels.conv3x3(conv, maps) is None
                and kernels.packed3x3(conv, conv.weight.detach(), torch.bfloat16) is None
            )
        assert not kernels.enable(compiled, convolutions=False).convolutions
        assert kernels.enabled() and kernels.conv3x3(conv, maps) is None
        kernels.disable()
        assert kernels.conv3x3(conv, maps) is None


def test_enable_is_eager_when_a_convolution_is_wrong(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = convolution._gradient_of_weight
    monkeypatch.setattr(convolution, "_gradient_of_weight", lambda *arguments: right(*arguments) * 1.5)
    support = kernels.enable(compiled)
    assert support.note.startswith("eager: the compiled convolution is wrong: it differs by 0.")
    assert not support.enabled and not support.convolutions and not kernels.convolves(torch.bfloat16)


@pytest.fixture
def in_float32(compiled: Path) -> Iterator[None]:
    if torch.float32 not in kernels.enable(compiled).convolutions:
        pytest.skip("this CPU has no AVX2")
    yield
    kernels.disable()


def by_winograd(conv: nn.Module, maps: Tensor) -> Tensor:
    result = kernels.conv3x3(conv, maps)
    assert result is not None and result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    return result


def assert_as_exact(found: Tensor | None, right: Tensor) -> None:
    assert found is not None
    assert float((found.detach().double() - right).abs().max() / right.abs().max()) < 4e-6


@pytest.mark.parametrize(("channels", "out_channels"), CHANNELS)
@pytest.mark.parametrize("side", [(8, 8), (1, 1), (1, 2), (3, 2), (4, 5), (6, 7), (9, 15), (2, 33)], ids=str)
def test_winograd_agrees_with_double_precision_and_has_its_gradients(
    side: tuple[int, int], channels: int, out_channels: int, in_float32: None
) -> None:
    """Sides with whole tiles and with parts of them, edges on each side of a tile; blocks that are not full."""
    height, width = (-(-length // convolution.TILE) for length in side)
    images = -(-convolution.FEWEST_TILES // (height * width))
    conv = layer(channels, out_channels, bias=True)
    maps = random(images, channels, *side, dtype=torch.float32).requires_grad_()
    result = by_winograd(conv, maps)
    gradient = random(*result.shape, seed=2, dtype=torch.float32)
    result.backward(gradient)
    right = maps.detach().double().requires_grad_()
    exactly = layer(channels, out_channels, bias=True).double()
    expected = exactly(right)
    expected.backward(gradient.double())
    assert right.grad is not None and exactly.weight.grad is not None and exactly.bias is not None
    assert exactly.bias.grad is not None and conv.bias is not None
    assert_as_exact(result, expected.detach())
    assert_as_exact(maps.grad, right.grad)
    assert_as_exact(conv.weight.grad, exactly.weight.grad)
    assert_as_exact(conv.bias.grad, exactly.bias.grad)


def test_winograd_puts_the_kernel_about_each_pixel_and_turns_nothing(in_float32: None) -> None:
    """One weight of nine pairs is 1 to 9, one pixel of the maps is 1: across the edge of a tile, and in its middle."""
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    conv.weight.data.zero_()
    conv.weight.data[2, 3] = torch.arange(1.0, 10).view(3, 3)
    for y, x in ((4, 5), (3, 4), (2, 1)):
        maps = torch.zeros(8, 16, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        by_winograd(conv, maps)[3, 2, y, x].backward()
        assert maps.grad is not None
        nine = slice(y - 1, y + 2), slice(x - 1, x + 2)
        assert_near(maps.grad[3, 3, *nine], [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        assert maps.grad.abs().sum() == pytest.approx(45, abs=1e-4)
        with torch.no_grad():
            maps[3, 3, y, x] = 1
        result = by_winograd(conv, maps)
        assert_near(result[3, 2, *nine], [[9, 8, 7], [6, 5, 4], [3, 2, 1]])
        assert float(result.detach().abs().sum()) == pytest.approx(45, abs=1e-4)


def assert_near(found: Tensor, right: list[list[int]]) -> None:
    torch.testing.assert_close(found.detach(), torch.tensor(right, dtype=torch.float32), rtol=0, atol=4e-6)


def test_winograd_adds_bias_and_shortcut_rectifies_and_lets_nan_through(in_float32: None) -> None:
    conv, maps = layer(16, 48, bias=True), random(2, 16, 8, 16, dtype=torch.float32)
    packed = kernels.packed3x3(conv, conv.weight.detach(), torch.float32)
    assert packed is not None and packed.fits(maps) and conv.bias is not None
    right = conv.double()(maps.double()).detach()
    bias, shortcut = conv.bias.detach().float(), random(*right.shape, seed=5, dtype=torch.float32)
    assert_as_exact(packed(maps, bias), right)
    assert_as_exact(packed(maps, bias, shortcut), right + shortcut)
    assert_as_exact(packed(maps, bias, shortcut, relu=True), (right + shortcut).relu())
    maps[1, 4, 2, 9] = math.nan
    broken = packed(maps, bias, shortcut, relu=True).isnan()
    # All pixels of a tile that reads it, and no other tile.
    assert bool(broken[1, :, 1:4, 8:11].all()) and not broken[0].any()
    assert not broken[1, :, :, 12:].any() and not broken[1, :, :, :4].any()


def test_winograd_has_the_same_bits_alone_in_a_batch_and_with_any_number_of_threads(in_float32: None) -> None:
    conv = layer(32, 64)
    packed = kernels.packed3x3(conv, conv.weight.detach(), torch.float32)
    maps = random(7, 32, 33, 32, dtype=torch.float32)
    assert packed is not None
    torch.set_num_threads(1)
    once = packed(maps)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(packed(maps), once)
    for row in range(7):
        assert torch.equal(packed(maps[row : row + 1].contiguous(memory_format=torch.channels_last))[0], once[row])


def test_winograd_gradients_have_the_same_bits_with_any_number_of_threads(in_float32: None) -> None:
    maps = random(5, 32, 33, 32, dtype=torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        conv, rows = layer(32, 64), maps.clone().requires_grad_()
        by_winograd(conv, rows).square().sum().backward()
        assert rows.grad is not None and conv.weight.grad is not None
        found.append((rows.grad, conv.weight.grad))
    assert all(torch.equal(*both) for other in found[1:] for both in zip(found[0], other, strict=True))


def test_winograd_leaves_the_gradient_of_many_weights_to_pytorch(in_float32: None) -> None:
    conv, maps = layer(144, 128), random(8, 144, 8, 8, dtype=torch.float32)
    assert convolution.LARGEST_SUMS < 144 * 128
    by_winograd(conv, maps).sum().backward()
    own, conv.weight.grad = conv.weight.grad, None
    conv(maps).sum().backward()
    assert own is not None and conv.weight.grad is not None and torch.equal(own, conv.weight.grad)


def test_winograd_is_for_float32_with_stride_1_and_enough_pixels(in_float32: None) -> None:
    enough = random(8, 16, 8, 8, dtype=torch.float32)
    assert kernels.conv3x3(layer(16, 16), enough) is not None
    for conv, maps in (
        (layer(16, 16, stride=2), random(16, 16, 8, 8, dtype=torch.float32)),
        (layer(3, 16), random(4, 3, 8, 8, dtype=torch.float32)),
        (layer(16, 16), enough[:7].contiguous(memory_format=torch.channels_last)),
        (layer(16, 16), enough.bfloat16()),
        (layer(16, 16), enough.contiguous()),
    ):
        assert kernels.conv3x3(conv, maps) is None
    with torch.no_grad():
        assert kernels.conv3x3(layer(16, 16), enough[:1]) is not None
    with kernels.paused():
        assert kernels.conv3x3(layer(16, 16), enough) is None
