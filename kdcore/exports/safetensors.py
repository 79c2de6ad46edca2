"""The student's weights as a safetensors file, under the network's own names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from base.references import STUDENT_FILE
from kdcore.data.images import Images
from kdcore.exports.exporter import Deliverable
from kdcore.spec import ExportFormat, ExportOptions


@dataclass(frozen=True)
class Safetensors:
    """The exporter. Its file has no operations; PyTorch runs it with the `student.py` beside it."""

    format: ExportFormat = "safetensors"
    file: str = STUDENT_FILE
    media_type: str = "application/octet-stream"
    runtime: str = "torch"

    def write(self, student: Deliverable, path: Path, options: ExportOptions, images: Images) -> None:
        write(student, path)


def write(student: Deliverable, path: Path) -> None:
    """Write the weights. The metadata's `distillery` is JSON with all facts for their use."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in student.weights.items()}
    _save(tensors, {"distillery": json.dumps(student.facts), "format": "pt"}, path)


def _save(tensors: dict[str, Tensor], notes: dict[str, str], path: Path) -> None:
    """Write the same bytes for the same student: safetensors shuffles the metadata, so it is sorted again."""
    content = bytearray(save(tensors, notes))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size]) | {"__metadata__": notes}
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(ordered) == size, "the same header in another order is as long"
    content[8 : 8 + size] = ordered
    # safetensors' own writer hides the error of a full disk.
    path.write_bytes(content)
