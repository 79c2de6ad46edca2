"""ONNX files, looked through before onnxruntime reads them: one file, the standard's operators, no loops.

An ONNX file is a protocol buffer: data, no code. What it can ask for is limited here and in `onnx_program`: it names
no other file, so that none is opened; its operators are the standard's own, so that no library is needed; and nothing
in it repeats, so that its size bounds its time as far as shapes do not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import TeacherMismatch

BYTES = 2**31 - 1
"""The largest protocol buffer."""
PARTS = 1_000_000
"""The most messages (nodes, attributes, tensors) in a file; a network of 1,000 layers has some 20,000."""
STANDARD = ("", "ai.onnx")
"""The names of the standard's own set of operators."""
ONE_FILE = (
    "save it with its weights inside: torch.onnx.export(..., external_data=False), or "
    "onnx.save(onnx.load('model.onnx'), 'teacher.onnx')"
)
EXPORT = "write it again, such as with torch.onnx.export(model.eval(), (images,), 'teacher.onnx', external_data=False)"
REFUSED = {
    **dict.fromkeys(("Loop", "Scan", "SequenceMap"), "a loop, whose number of turns nothing bounds"),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
        "random numbers",
    ),
    "ImageDecoder": "the decoding of image files",
    **dict.fromkeys(("StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer"), "text"),
}
"""Operators of the standard that no classifier of images needs, and what they do."""


@dataclass(frozen=True)
class Contents:
    """What a file says about itself."""

    parameters: int
    """All numbers of its weights; those of batch norms include their running statistics."""


def look_through(path: Path) -> Contents:
    """Return what the file says. Raises TeacherMismatch for anything but one complete file of standard operators."""
    from google.protobuf.message import DecodeError

    if (size := path.stat().st_size) > BYTES:
        raise TeacherMismatch(f"the ONNX file has {size:,} bytes; a protocol buffer has at most {BYTES:,}")
    try:
        return _look_through(path.read_bytes())
    except (DecodeError, UnicodeDecodeError) as error:
        raise TeacherMismatch(
            "the ONNX file is cut short or damaged", hint="compare its size, or copy it again"
        ) from error


def _look_through(file: bytes) -> Contents:
    import onnx

    model = onnx.ModelProto.FromString(file)
    if not model.HasField("graph") or not model.graph.node:
        raise TeacherMismatch("the ONNX file holds no graph: it is cut short or damaged", hint=EXPORT)
    if model.functions:
        raise TeacherMismatch(
            f"the ONNX file defines operators of its own, first {model.functions[0].name}",
            hint="onnx.inliner.inline_local_functions(model) replaces them by standard ones",
        )
    for number, message in enumerate(_messages(model)):
        if number > PARTS:
            raise TeacherMismatch(f"the ONNX file has more than {PARTS:,} parts", hint=EXPORT)
        if isinstance(message, onnx.NodeProto):
            _refuse_operator(message)
        elif isinstance(message, onnx.TensorProto):
            _refuse_other_files(message, onnx.TensorProto.EXTERNAL)
    types = onnx.TensorProto
    weights = {types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE, types.INT8, types.UINT8}
    return Contents(sum(math.prod(one.dims) for one in model.graph.initializer if one.data_type in weights))


def _messages(message: Any) -> Iterator[Any]:
    """Yield the message and all messages inside, wherever a file may put them. Numbers and bytes are not copied."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in (value,) if hasattr(value, "ListFields") else value:
                yield from _messages(one)


def _refuse_operator(node: Any) -> None:
    name = f"{node.domain}.{node.op_type}" if node.domain not in STANDARD else node.op_type
    if node.domain not in STANDARD:
        raise TeacherMismatch(
            f"the ONNX file needs the operator {name}, which is not one of the ONNX standard",
            hint="export the network with standard operators only; onnxruntime's own come from its optimised files, so "
            "give the file from before that",
        )
    if what := REFUSED.get(node.op_type):
        raise TeacherMismatch(
            f"the ONNX file uses {name}: {what}", hint="export a network in eval mode that is a plain series of layers"
        )


def _refuse_other_files(tensor: Any, external: int) -> None:
    if tensor.data_location == external or tensor.external_data:
        where = next((entry.value for entry in tensor.external_data if entry.key == "location"), "another file")
        raise TeacherMismatch(
            f"the ONNX file keeps {tensor.name[:100]!r} in another file ({where[:200]!r}), which is never opened",
            hint=ONE_FILE,
        )
