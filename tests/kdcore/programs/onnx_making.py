"""ONNX files made on the spot: exported networks, and graphs of single nodes. They need the extra `onnx`."""

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
    reason="the extra distillery[onnx] is absent",
)
ANY_BATCH = {0: "N"}
ANY_SIZE = {0: "N", 2: "H", 3: "W"}
MEAN_COLOUR = (("GlobalAveragePool", "x", "pooled"), ("Flatten", "pooled", "flat"), ("MatMul", "flat w", "logits"))
"""Nodes from images x to four logits: their mean colours times the weights w."""


def exported(network: nn.Module, path: Path, images: Tensor, open_sides: dict[int, str] | None = None) -> Path:
    """The network as torch.onnx.export writes it; `open_sides`: the sizes that may vary, by dimension."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's of its older exporter, which needs no further library.
        sides = {"x": open_sides} if open_sides else None
        torch.onnx.export(
            network.eval(), (images,), str(path), dynamo=False, input_names=["x"], output_names=["y"],
            dynamic_axes=sides and {**sides, "y": ANY_BATCH},
        )  # fmt: skip
    return path


def tensor(name: str, *values: float, shape: Sequence[int] | None = None, whole: bool = False) -> Any:
    """A constant of floats, or of int64 if `whole`."""
    from onnx import TensorProto, helper

    kind = TensorProto.INT64 if whole else TensorProto.FLOAT
    return helper.make_tensor(name, kind, [len(values)] if shape is None else shape, values)


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def model(
    *nodes: Any,
    constants: Sequence[Any] = (),
    images: Sequence[Any] = ("N", 3, 8, 8),
    logits: Sequence[Any] = ("N", 4),
    kind: int = 1,
    opset: int = 17,
) -> Any:
    """A model from images x to logits y, with the weights w (3 x 4) beside the constants; `kind`: 1 is float32."""
    from onnx import TensorProto, helper

    weights = tensor("w", *(index / 10 for index in range(12)), shape=(3, 4))
    graph = helper.make_graph(
        [node(*one) if isinstance(one, tuple) else one for one in nodes],
        "graph",
        [helper.make_tensor_value_info("x", kind, images)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, logits)],
        [weights, *constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def plain(*more: Any, constants: Sequence[Any] = (), **shapes: Any) -> Any:
    """The model of the mean colour; `more` are nodes from `logits` to y."""
    return model(*MEAN_COLOUR, *(more or [("Identity", "logits", "y")]), constants=constants, **shapes)


def saved(path: Path, content: Any) -> Path:
    path.write_bytes(content.SerializeToString())
    return path
