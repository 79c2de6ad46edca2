"""A program's inputs and outputs: one tensor of images, one tensor of logits, and its own weights.

Shapes: N batch, C channels, H × W pixels, K classes.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from base.errors import TeacherMismatch
from kdcore.programs.program import EVAL_FIRST
from kdcore.programs.pt2 import DTYPES, Contents

DYNAMIC_BATCH = 'torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))'
ONE_TENSOR = "export a network that takes one float32 tensor of images and returns one of logits"


class Own(NamedTuple):
    """A weight or constant of the program, under its name in the graph."""

    name: str
    tensor: Tensor
    is_parameter: bool


class Shape(NamedTuple):
    """Required sizes of images and logits; None accepts any size."""

    channels: int
    height: int | None
    width: int | None
    classes: int
    largest_batch: int | None
    memory_format: torch.memory_format


def inputs(contents: Contents) -> tuple[str, list[Own]]:
    """Return the name of the images, and the program's own tensors."""
    images: list[str | None] = []
    own: list[Own] = []
    for spec in contents.model["graph_module"]["signature"]["input_specs"]:
        [(kind, value)] = spec.items()
        match kind:
            case "user_input":
                images.append(value["arg"].get("as_tensor", {}).get("name"))
            case "parameter":
                own.append(Own(value["arg"]["name"], contents.weights[value["parameter_name"]], True))
            case "buffer":
                tensors = contents.weights if value["persistent"] else contents.constants
                own.append(Own(value["arg"]["name"], tensors[value["buffer_name"]], False))
            case "tensor_constant":
                own.append(Own(value["arg"]["name"], contents.constants[value["tensor_constant_name"]], False))
            case "constant_input":
                pass  # A flag whose value the traced graph contains already.
            case _:
                raise TeacherMismatch(f"the program needs more than tensors: a {kind}", hint=ONE_TENSOR)
    if len(images) != 1 or images[0] is None:
        raise TeacherMismatch(f"the program takes {len(images)} inputs, not one tensor of images", hint=ONE_TENSOR)
    return images[0], own


def logits(contents: Contents) -> str:
    """Return the name of the only output."""
    specs = contents.model["graph_module"]["signature"]["output_specs"]
    if any(kind.endswith("mutation") for spec in specs for kind in spec):
        raise TeacherMismatch("the program changes its own buffers as it runs", hint=EVAL_FIRST)
    named = [spec.get("user_output", {}).get("arg", {}).get("as_tensor", {}).get("name") for spec in specs]
    if len(named) != 1 or named[0] is None:
        raise TeacherMismatch(f"the program returns {len(named)} values, not one tensor of logits", hint=ONE_TENSOR)
    name: str = named[0]
    return name


def shape(contents: Contents, images: str, logits: str) -> Shape:
    """Return the sizes. Raises TeacherMismatch unless the input is a batch of images and the output one of logits."""
    known = contents.model["graph_module"]["graph"]["tensor_values"]
    _refuse_other_tensors("takes", known[images], "N x C x H x W")
    _refuse_other_tensors("returns", known[logits], "N x K")
    sizes = known[images]["sizes"]
    batch, channels, height, width = map(_size, sizes)
    if batch is not None:
        raise TeacherMismatch(f"the program was exported for batches of exactly {batch}", hint=DYNAMIC_BATCH)
    answers, classes = known[logits]["sizes"]
    if channels is None or _size(classes) is None or answers != sizes[0]:
        made = f"{format_sizes(map(_size, known[logits]['sizes']))} numbers of {format_sizes(map(_size, sizes))}"
        raise TeacherMismatch(f"the program makes {made}, not a number of logits for each image", hint=ONE_TENSOR)
    last = channels > 1 and _size(known[images]["strides"][1]) == 1
    return Shape(
        channels, height, width, classes["as_int"],
        largest_batch=_largest(sizes[0]["as_expr"]["expr_str"], contents.model["range_constraints"]),
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip


def format_sizes(sizes: Iterable[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in sizes)


def _refuse_other_tensors(verb: str, meta: Mapping[str, Any], dimensions: str) -> None:
    dtype = DTYPES[meta["dtype"]]
    if dtype != torch.float32 or len(meta["sizes"]) != len(dimensions.split(" x ")):
        kind = f"{str(dtype).removeprefix('torch.')} of shape {format_sizes(map(_size, meta['sizes'])) or 'one number'}"
        raise TeacherMismatch(f"the program {verb} {kind}, not float32 {dimensions}", hint=ONE_TENSOR)


def _size(size: Mapping[str, Any]) -> int | None:
    """Return the size; None if it may vary."""
    return size.get("as_int")


def _largest(expression: str, ranges: Mapping[str, Mapping[str, int | None]]) -> int | None:
    """Return the maximum of a symbolic size, written `s77` or `Symbol('s77', positive=True, integer=True)`."""
    symbol = re.fullmatch(r"(?:Symbol\(')?(\w+)(?:'.*\))?", expression)
    return ranges.get(symbol[1], {}).get("max_val") if symbol else None
