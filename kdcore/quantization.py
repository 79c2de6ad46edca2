"""Training for int8: a network that computes with rounded weights and activations, and their learned ranges.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018,
arXiv:1712.05877, sections 2.1 and 3:

    activations   u8, affine, one range a tensor:  s = (high - low) / 255,  z = round(-low / s),  low <= 0 <= high
                                                   x' = s (clamp(round(x / s) + z, 0, 255) - z)
    weights       s8, symmetric, one scale an output channel:  s = max |w| / 127
    gradients     as if nothing were rounded (straight through); 0 outside of the range

This is what onnxruntime's static quantisation in QDQ form makes of an exported network: u8 activations, s8 weights per
channel. Tensors are rounded at the same places, where a convolution, a linear layer, a sum, a product, a pooling or a
norm reads them. A batch norm and an activation behind a convolution belong to it, and read nothing rounded. Weights are
rounded before their batch norm is folded into them, which gives the same integers: the norm scales a whole output
channel, and so its largest weight.

Ranges of activations are those of the first images, averaged over batches, and follow the training as a moving average
of each batch's smallest and largest value (section 3.1). The network stays in eval mode: its batch norms keep the
statistics that they had at the start (Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference",
2018, arXiv:1806.08342, section 3.2.2), and nothing is dropped. So what is trained is what is exported.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger("kdcore")

FOLLOW = 0.01
"""The share of a batch in the moving average of a range: PyTorch's MovingAverageMinMaxObserver has the same."""
LEVELS = 255
LARGEST_WEIGHT = 127
TINY = torch.finfo(torch.float32).tiny

_READERS = {
    "conv2d": "conv",
    "linear": "linear",
    **dict.fromkeys(("add", "add_"), "add"),
    **dict.fromkeys(("mul", "mul_"), "mul"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "cat"),
    "batch_norm": "batch_norm",
    **dict.fromkeys(("layer_norm", "group_norm"), "norm"),
    **dict.fromkeys(("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "mean"), "pool"),
    **dict.fromkeys(("hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "tanh", "leaky_relu", "elu"), "activation"),
}
"""The functions of torch that read rounded tensors, by name. A ReLU is not among them: it is computed on integers, with
the convolution or sum before it; nor is a batch norm behind a convolution, into which it is folded."""
_WITH_WEIGHT = ("conv", "linear")
_OF_TWO = ("add", "mul")
_IN_PLACE: dict[str, Callable[..., Tensor]] = {"add_": torch.add, "mul_": torch.mul}

_OPERATORS = {
    "Conv": "conv",
    "Gemm": "linear",
    "MatMul": "linear",
    "Add": "add",
    "Mul": "mul",
    "Concat": "cat",
    "BatchNormalization": "batch_norm",
    **dict.fromkeys(("LayerNormalization", "GroupNormalization"), "norm"),
    **dict.fromkeys(("GlobalAveragePool", "AveragePool", "MaxPool", "ReduceMean"), "pool"),
    **dict.fromkeys(("HardSwish", "HardSigmoid", "Sigmoid", "Gelu", "Tanh", "LeakyRelu", "Elu"), "activation"),
}
"""The operators of ONNX that a reader becomes."""
_SAME_VALUES = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose output has the range of their input."""

Range = Mapping[str, Any]
"""The range of one activation, as plain data: `low`, `high`, and `read_by`: [kind, number, argument] of each place that
reads it, for example ["conv", 3, 0]: the first argument of the fourth convolution that a forward pass runs."""


class FakeQuantization(TorchFunctionMode):
    """Rounds what a network computes while it is entered, as int8 would.

    It sees each function of torch that the network calls, so that no module need be replaced: the network keeps its
    names, its state and its taps. A tensor that is read at several places is rounded once, and has one range.
    """

    def __init__(self, ranges: Sequence[Range] = (), device: torch.device | None = None) -> None:
        super().__init__()
        self._read_by: list[list[tuple[str, int, int]]] = [
            [(str(kind), int(number), int(argument)) for kind, number, argument in one["read_by"]] for one in ranges
        ]
        self._ranges = torch.tensor([[one["low"], one["high"]] for one in ranges], device=device).view(-1, 2)
        """P × 2: low and high of each activation, in the order in which a forward pass reads them."""
        self._follows = False
        self._batches: int | None = None
        """The number of batches measured so far; None if tensors are rounded."""
        self._calls = Counter[str]()
        self._at = 0
        self._rounded: Any = WeakIdKeyDictionary()
        self._convolved: Any = WeakIdKeyDictionary()
        """The outputs of convolutions."""

    def ranges(self) -> list[Range]:
        """Return the ranges as plain data, from which an equal one is made."""
        pairs = zip(self._read_by, self._ranges.tolist(), strict=True)
        return [{"read_by": [list(one) for one in readers], "low": low, "high": high} for readers, (low, high) in pairs]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Find the activations and measure their ranges during a `with` block, in which nothing is rounded: the means
        of each batch's smallest and largest values."""
        self._read_by, self._ranges, self._batches = [], self._ranges.new_empty(0, 2), 0
        try:
            yield
        finally:
            self._batches = None

    def run(self, network: Callable[[Tensor], Tensor], images: Tensor, follows: bool) -> Tensor:
        """Return the network's output. `follows`: its ranges follow those of these images."""
        self._follows, self._at, self._calls = follows, 0, Counter()
        if self._batches is not None:
            self._batches += 1
        try:
            with self:
                return network(images)
        finally:
            self._rounded.clear()
            self._convolved.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind = _READERS.get(func.__name__)
        if kind is None or (kind == "batch_norm" and args[0] in self._convolved):
            return func(*args, **(kwargs or {}))
        given = list(args)
        if kind == "cat":
            given[0] = self._inputs(kind, list(given[0]))
        elif kind in _OF_TWO:
            if not all(_is_activation(one) for one in given[:2]):  # A constant is no activation.
                return func(*args, **(kwargs or {}))
            given[:2] = self._inputs(kind, given[:2])
        else:
            given[:1] = self._inputs(kind, given[:1])
            if kind in _WITH_WEIGHT and len(given) > 1 and self._batches is None:
                given[1] = rounded_weight(given[1])
        if func.__name__ in _IN_PLACE:
            return args[0].copy_(_IN_PLACE[func.__name__](*given, **(kwargs or {})))
        result = func(*given, **(kwargs or {}))
        if kind == "conv":
            self._convolved[result] = True
        return result

    def _inputs(self, kind: str, tensors: list[Tensor]) -> list[Tensor]:
        number = self._calls[kind]
        self._calls[kind] += 1
        return [self._activation(one, (kind, number, argument)) for argument, one in enumerate(tensors)]

    def _activation(self, tensor: Tensor, reader: tuple[str, int, int]) -> Tensor:
        """Return a tensor as a reader gets it."""
        if not _is_activation(tensor):
            return tensor
        found = self._rounded.get(tensor)
        if found is not None and found[0] == tensor._version:
            _, place, rounded = found
            if self._batches == 1:
                self._read_by[place].append(reader)
            return tensor if rounded is None else rounded
        place, self._at = self._at, self._at + 1
        if self._batches is not None:
            self._measure(place, tensor, reader)
            self._rounded[tensor] = tensor._version, place, None
            return tensor
        if self._follows:
            self._ranges[place].lerp_(_extremes(tensor), FOLLOW)
        rounded = rounded_activation(tensor, *self._ranges[place].clone())
        self._rounded[tensor] = tensor._version, place, rounded
        return rounded

    def _measure(self, place: int, tensor: Tensor, reader: tuple[str, int, int]) -> None:
        found, batches = _extremes(tensor), self._batches or 1
        if batches == 1:
            self._read_by.append([reader])
            self._ranges = torch.cat([self._ranges.to(tensor.device), found.unsqueeze(0)])
        else:
            self._ranges[place].lerp_(found, 1 / batches)


def rounded_activation(tensor: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return a tensor as u8 has it, in a range, which is widened to hold 0. As in onnxruntime, all is 0 in a range of
    nothing but 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / LEVELS
    scale = torch.where(scale < TINY, 1.0, scale)
    zero = (-low / scale).round().int()
    return torch.fake_quantize_per_tensor_affine(tensor, scale, zero, 0, LEVELS)


def rounded_weight(weight: Tensor) -> Tensor:
    """Return a weight as s8 has it, each output channel (the first dimension) by its own scale."""
    with torch.no_grad():
        scale = weight.detach().abs().flatten(1).amax(1) / LARGEST_WEIGHT
        scale = torch.where(scale < TINY, 1.0, scale)
        zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT)


def keep_in_eval(network: nn.Module) -> None:
    """Let a network stay in eval mode: batch norms keep their statistics, and no dropout and no stochastic depth
    changes the range of an activation, or adds a product that the exported graph does not have."""
    network.train = MethodType(_stay_in_eval, network)  # type: ignore[method-assign]
    network.train()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def of_tensors(model: Any, ranges: Iterable[Range]) -> dict[str, tuple[float, float]]:
    """Return the ranges of an exported network's tensors by their names: low and high.

    `model`: an `onnx.ModelProto` whose batch norms are folded. A network calls its convolutions, sums and so on in the
    order of the graph's nodes, so each is found by its number among those of its kind. Kinds of which the graph has
    another number than the network, as operators of an exporter may add, are left out, and so are tensors that the
    network does not round: their ranges have to be measured. onnxruntime takes those that are found as
    `TensorQuantOverrides`: {name: [{"rmin": low, "rmax": high}]}, each a float32 of numpy.
    """
    constants = {one.name for one in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    nodes: dict[str, list[Any]] = {}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
        elif (kind := _kind(node, constants, makers)) is not None:
            nodes.setdefault(kind, []).append(node)
    rows = [(one, tuple(reader)) for one in ranges for reader in one["read_by"]]
    counted = {kind: 1 + max(number for _, (own, number, _) in rows if own == kind) for _, (kind, _, _) in rows}
    found: dict[str, tuple[float, float]] = {}
    others = {kind for kind, count in counted.items() if len(nodes.get(kind, ())) != count}
    if others:
        log.info("the graph has other numbers of %s than the network: their ranges are calibrated", sorted(others))
    for one, (kind, number, argument) in rows:
        if kind in others:
            continue
        name = nodes[kind][number].input[argument]
        while True:
            found.setdefault(name, (one["low"], one["high"]))
            maker = makers.get(name)
            if maker is None or maker.op_type not in _SAME_VALUES:
                break
            name = maker.input[0]
    return found


def _kind(node: Any, constants: set[str], makers: Mapping[str, Any]) -> str | None:
    """Return the kind of reader that an operator is; None if it is none."""
    kind = _OPERATORS.get(node.op_type)
    if kind in _OF_TWO and (constants & set(node.input[:2]) or _is_gated(node, makers)):
        return None
    if node.op_type == "MatMul" and node.input[1] not in constants:
        return None  # A product of two activations, as in attention.
    return kind


def _is_gated(node: Any, makers: Mapping[str, Any]) -> bool:
    """Return True for x · sigmoid(x), which is one function of torch."""
    gates = [
        makers[name] for name in node.input if name in makers and makers[name].op_type in ("Sigmoid", "HardSigmoid")
    ]
    return node.op_type == "Mul" and any(gate.input[0] in node.input for gate in gates)


@torch.no_grad()
def _extremes(tensor: Tensor) -> Tensor:
    return torch.stack(torch.aminmax(tensor.detach())).float()


def _is_activation(given: object) -> bool:
    """Return True for what a network computes, beside its parameters and constants."""
    return (
        isinstance(given, Tensor)
        and given.dim() > 1
        and given.is_floating_point()
        and not isinstance(given, nn.Parameter)
    )
