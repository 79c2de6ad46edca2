"""Our 3 × 3 convolutions against oneDNN's: CPU time on one thread, by turns.

    .venv/bin/python -m bench.convolutions [--precision bf16] [--turns 60] [--batch 64]

A figure is oneDNN's time divided by ours, a median over turns: more than 1 means that ours is faster. Each turn takes
other maps, more of them than the caches hold, as in a training. CPU time is that of the thread, so a busy machine
changes little. In float32 the convolutions with a stride are oneDNN's on both sides, and are left out. The last columns
are errors of the forward pass, ours and oneDNN's: the root mean square of what differs from float64, as a share of that
of the values.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from kdcore import kernels
from kdcore.models.layers import RELU, conv_norm, fold

SHAPES = ((16, 16, 32, 1), (32, 32, 16, 1), (64, 64, 8, 1), (16, 32, 32, 2), (32, 64, 16, 2), (64, 64, 24, 1),
          (128, 128, 12, 1))  # fmt: skip
"""Input and output channels, side of the maps, stride: those of ResNet-20 and 56, and two of ResNet-18 at 96 pixels."""
SETS = 8
"""Sets of maps that are taken by turns."""
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("forward", "forward, shortcut and ReLU", "gradient of the maps", "gradient of the weight")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.convolutions", description="Ours against oneDNN's.")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="distillery-convolutions-") as folder:
        precision, support = PRECISIONS[options.precision], kernels.enable(Path(folder))
        if precision not in support.convolutions:
            print(f"no convolutions here: {support.note}", file=sys.stderr)
            return 1
        shapes = [shape for shape in SHAPES if precision == torch.bfloat16 or shape[-1] == 1]
        print(
            "| channels, side, stride |", " | ".join(f"{part}: times as fast" for part in PARTS), "| error | oneDNN's |"
        )
        print("|---" * (len(PARTS) + 3) + "|")
        for shape in shapes:
            ratios = [ratio(part, shape, options.batch, options.turns, precision) for part in PARTS]
            channels, out_channels, side, stride = shape
            cells = [f"{channels} to {out_channels}, {side}, {stride}", *(f"{one:.2f}" for one in ratios)]
            cells += [f"{one:.1e}" for one in errors(shape, options.batch, precision)]
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def ratio(part: str, shape: tuple[int, int, int, int], batch: int, turns: int, precision: torch.dtype) -> float:
    """Return oneDNN's time of a part divided by ours, the median over turns."""
    runs = list(_runs(part, shape, batch, precision))
    found = []
    for turn in range(turns + SETS):
        run, seconds = runs[turn % SETS], {}
        # The order alternates, so that neither always finds the maps in the cache.
        for own in (turn // SETS % 2 == 0, turn // SETS % 2 == 1):
            seconds[own] = _seconds(run, own)
        found.append(seconds[False] / seconds[True])
    return median(found[SETS:])


@torch.no_grad()
def errors(shape: tuple[int, int, int, int], batch: int, precision: torch.dtype) -> tuple[float, float]:
    """Return the relative errors (root mean square) of the forward pass, ours and oneDNN's, on the same numbers."""
    channels, out_channels, side, stride = shape
    conv = _layer(channels, out_channels, stride)
    conv.weight.copy_(conv.weight.to(precision))
    maps = _maps(batch, channels, side, precision)
    exact = nn.functional.conv2d(maps.double(), conv.weight.double(), None, stride, 1)
    own = _forward(conv, maps)
    with kernels.paused():
        other = _forward(conv, maps)
    found = [
        float((one.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()) for one in (own, other)
    ]
    return found[0], found[1]


def _seconds(run: Callable[[], object], own: bool) -> float:
    if own:
        begun = time.thread_time()
        run()
        return time.thread_time() - begun
    with kernels.paused():
        begun = time.thread_time()
        run()
        return time.thread_time() - begun


def _runs(
    part: str, shape: tuple[int, int, int, int], batch: int, precision: torch.dtype
) -> Iterator[Callable[[], object]]:
    """Yield what computes a part, once for each set of maps: by our kernels, and while these are paused by oneDNN."""
    channels, out_channels, side, stride = shape
    for _ in range(SETS):
        conv = _layer(channels, out_channels, stride)
        maps = _maps(batch, channels, side, precision)
        gradient = _maps(batch, out_channels, (side - 1) // stride + 1, precision)
        if part == "forward":
            yield lambda conv=conv, maps=maps: _forward(conv, maps)
        elif part == "forward, shortcut and ReLU":
            layers = nn.Sequential(conv, nn.BatchNorm2d(out_channels)).eval().requires_grad_(False)
            fold(layers, bf16=precision == torch.bfloat16)
            yield lambda layers=layers, maps=maps, shortcut=gradient: conv_norm(*layers, maps, RELU, shortcut)
        else:
            of_maps = part == "gradient of the maps"
            yield _Backward(conv, maps, gradient, of_maps)


class _Backward:
    """The gradient alone: the forward pass is made before, by our kernels and by oneDNN."""

    def __init__(self, conv: nn.Conv2d, maps: Tensor, gradient: Tensor, of_maps: bool) -> None:
        maps.requires_grad_(of_maps)
        conv.weight.requires_grad_(not of_maps)
        self.to, self.gradient = maps if of_maps else conv.weight, gradient
        self.own = self._output(conv, maps)
        with kernels.paused():
            self.other = self._output(conv, maps)

    @staticmethod
    def _output(conv: nn.Conv2d, maps: Tensor) -> Tensor:
        with _autocast(maps):
            result = kernels.conv3x3(conv, maps)
            return conv(maps) if result is None else result

    def __call__(self) -> None:
        output = self.own if kernels.enabled() else self.other
        torch.autograd.grad(output, self.to, self.gradient, retain_graph=True)


def _forward(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    with torch.no_grad(), _autocast(maps):
        result = kernels.conv3x3(conv, maps)
        return conv(maps) if result is None else result


def _autocast(maps: Tensor) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=maps.dtype == torch.bfloat16)


def _layer(channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
    return conv.to(memory_format=torch.channels_last)


def _maps(batch: int, channels: int, side: int, precision: torch.dtype) -> Tensor:
    return torch.randn(batch, channels, side, side).to(precision, memory_format=torch.channels_last)


if __name__ == "__main__":
    sys.exit(main())
