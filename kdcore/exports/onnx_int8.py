"""The student as an ONNX file in int8, by onnxruntime's static quantisation in QDQ form: activations u8, weights s8
with one scale for each output channel, as in Jacob et al., CVPR 2018, arXiv:1712.05877.

The ranges of activations are the least and largest values on training images without augmentation. What was learned in
quantisation-aware training replaces them. The logits stay float: rounded ones would be equal for several classes.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcore.data.images import Images
from kdcore.exports.exporter import Deliverable
from kdcore.exports.onnx import INPUT, graph, with_facts
from kdcore.exports.torch_export import translating
from kdcore.quantization import of_tensors
from kdcore.spec import ExportFormat, ExportOptions

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("kdcore")

BATCH = 32
_WITH_WEIGHTS = ("Conv", "Gemm", "MatMul")
_FLOAT = ("LayerNormalization", "InstanceNormalization", "BatchNormalization", "Softmax")
"""Operators that stay float: they have few numbers to compute, and rounding costs a transformer much. Measured on
timm's `test_vit`, untrained: 62 % of answers kept with all of onnxruntime's operators, 75 % without these."""


@dataclass(frozen=True)
class OnnxInt8:
    """The exporter."""

    format: ExportFormat = "onnx_int8"
    file: str = "student.int8.onnx"
    media_type: str = "application/octet-stream"
    runtime: str = "onnxruntime"

    def write(self, student: Deliverable, path: Path, options: ExportOptions, images: Images) -> None:
        # Before its first import: newer versions report themselves to their vendor.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnx

        with _scratch(path.parent) as folder, translating():
            onnx.save(graph(student, options), folder / "float.onnx")
            _prepare(folder / "float.onnx", folder / "prepared.onnx")
            _quantize(folder / "prepared.onnx", folder / "int8.onnx", student, options, images)
            path.write_bytes(with_facts(_tidied(onnx.load(folder / "int8.onnx")), student, options))


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    """Yield a folder that goes away, in which onnxruntime makes its temporary files, too."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def _prepare(source: Path, target: Path) -> None:
    """Infer all shapes, and simplify the graph, as onnxruntime's quantisation wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(source, target)
    except Exception as error:  # It raises Exception itself: its symbolic inference does not know each operator.
        log.info("shapes are inferred without symbols: %s", error)
        quant_pre_process(source, target, skip_symbolic_shape=True)


def _quantize(source: Path, target: Path, student: Deliverable, options: ExportOptions, images: Images) -> None:
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    model = onnx.load(source)
    quantization.quantize_static(
        source,
        target,
        _CalibrationImages(student, options, images),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry} - {*_FLOAT}),
        nodes_to_exclude=_after_logits(model) if student.members > 1 else [],
        calibrate_method=quantization.CalibrationMethod.MinMax,
        calibration_providers=["CPUExecutionProvider"],
        extra_options={
            "OpTypesToExcludeOutputQuantization": ["Gemm"],
            "TensorQuantOverrides": _learned(model, student),
        },
    )


def _learned(model: onnx.ModelProto, student: Deliverable) -> dict[str, list[dict[str, Any]]]:
    """Return the learned ranges of a graph's tensors, in onnxruntime's form. They hold 0, as u8 must."""
    if student.activation_ranges is None:
        return {}
    import numpy as np

    found = of_tensors(model, student.activation_ranges)
    return {
        name: [{"rmin": np.float32(min(low, 0.0)), "rmax": np.float32(max(high, 0.0))}]
        for name, (low, high) in found.items()
    }


def _after_logits(model: onnx.ModelProto) -> list[str]:
    """Return the names of the operations behind the members of an ensemble: probabilities need all their digits."""
    makers = {name: node for node in model.graph.node for name in node.output}
    to_come, found = [one.name for one in model.graph.output], dict[str, None]()
    while to_come:
        node = makers.get(to_come.pop())
        if node is not None and node.op_type not in _WITH_WEIGHTS and node.name not in found:
            found[node.name] = None
            to_come += node.input
    return list(found)


class _CalibrationImages:
    """onnxruntime's data reader: training images, evenly spaced over the split, as the file gets them."""

    def __init__(self, student: Deliverable, options: ExportOptions, images: Images) -> None:
        self._images, count = images.at(None), min(options.calibration_images, len(images))
        rows = torch.linspace(0, len(images) - 1, count).round().long()
        self._rows: Iterator[torch.Tensor] = iter(torch.split(rows, BATCH))
        inside = options.normalization == "inside"
        self._mean, self._std = (
            torch.tensor(neutral if inside else values).view(1, -1, 1, 1)
            for neutral, values in (([0.0], student.mean), ([1.0], student.std))
        )

    def get_next(self) -> dict[str, Any] | None:
        rows = next(self._rows, None)
        if rows is None:
            return None
        pixels = self._images.pixels.index_select(0, rows).cpu()
        return {INPUT: ((pixels.float() / 255 - self._mean) / self._std).contiguous().numpy()}


def _tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that names only the sets of operators that it uses."""
    used = {node.domain for node in model.graph.node}
    kept = [one for one in model.opset_import if one.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model
