"""The student for OpenVINO, an optional extra: its intermediate representation, made from the ONNX graph.

A zip of `student.xml`, the graph, and `student.bin`, the weights. `distillery` in the graph's rt_info is JSON with all
facts for its use.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcore.data.images import Images
from kdcore.exports.exporter import Deliverable
from kdcore.exports.onnx import graph
from kdcore.exports.torch_export import translating
from kdcore.spec import ExportFormat, ExportOptions


@dataclass(frozen=True)
class OpenVino:
    """The exporter."""

    format: ExportFormat = "openvino"
    file: str = "student.openvino.zip"
    media_type: str = "application/zip"
    runtime: str = "openvino"

    def write(self, student: Deliverable, path: Path, options: ExportOptions, images: Images) -> None:
        model = graph(student, options)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, translating():
            openvino = _silent()
            converted = openvino.Core().read_model(model.SerializeToString())
            _name(converted)
            converted.set_rt_info(json.dumps(student.facts_of(options)), ["distillery"])
            openvino.save_model(converted, f"{folder}/student.xml", compress_to_fp16=False)
            with zipfile.ZipFile(path, "w") as archive:
                for name in ("student.xml", "student.bin"):
                    # Without its time, so that the same student is the same file.
                    archive.writestr(zipfile.ZipInfo(name), Path(folder, name).read_bytes())


def _silent() -> Any:
    """Return the package openvino, whose import otherwise reports itself to its vendor."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment] # what makes an import fail; it has a stub then
    import openvino

    return openvino


def _name(model: Any) -> None:
    """Number the operations of a graph anew: their numbers count all that this process has converted."""
    for number, operation in enumerate(model.get_ordered_ops()):
        kind = operation.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{kind}_{number}")
