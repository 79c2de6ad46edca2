"""The student as an ONNX file, by PyTorch's exporter: opset 20, any batch, batch norms folded into convolutions.

Its input is `images`, float32 N × C × H × W, normalised unless `normalization` is "inside"; its output is `logits`,
N × K. The metadata's `distillery` is JSON with all facts for its use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcore.data.images import Images
from kdcore.exports.exporter import Deliverable
from kdcore.exports.torch_export import program, translating
from kdcore.spec import ExportFormat, ExportOptions

if TYPE_CHECKING:
    import onnx

OPSET = 20
INPUT, OUTPUT = "images", "logits"


@dataclass(frozen=True)
class Onnx:
    """The exporter."""

    format: ExportFormat = "onnx"
    file: str = "student.onnx"
    media_type: str = "application/octet-stream"
    runtime: str = "onnxruntime"

    def write(self, student: Deliverable, path: Path, options: ExportOptions, images: Images) -> None:
        model = graph(student, options)
        with translating():  # A file of this format has at most 2 GiB.
            path.write_bytes(with_facts(model, student, options))


def graph(student: Deliverable, options: ExportOptions) -> onnx.ModelProto:
    """Return the student's float graph, without metadata, which is made once for all files. Raises CannotExport."""
    key = f"onnx {options.normalization}"
    if key not in student.made:
        import onnx

        with translating():
            made: Any = torch.onnx.export(
                program(student, options),
                dynamo=True,
                dynamic_shapes=({0: "batch"},),  # Of a program that has them already, their names.
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                external_data=False,
                verbose=False,
            )
            model = made.model_proto
            _forget_sources(model)
            onnx.checker.check_model(model, full_check=True)
        student.made[key] = model
    found: onnx.ModelProto = student.made[key]
    return found


def _forget_sources(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes on each part: they quote our source."""
    whole = model.graph
    for part in (whole, *whole.node, *whole.input, *whole.output, *whole.value_info, *whole.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def with_facts(model: onnx.ModelProto, student: Deliverable, options: ExportOptions) -> bytes:
    """Return a graph as the bytes of a file with the student's facts."""
    import onnx

    noted = onnx.ModelProto()
    noted.CopyFrom(model)
    del noted.metadata_props[:]
    onnx.helper.set_model_props(noted, {"distillery": json.dumps(student.facts_of(options))})
    content: bytes = noted.SerializeToString(deterministic=True)
    return content
