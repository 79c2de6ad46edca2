"""The student as an exported program of PyTorch (`.pt2`): its graph and weights, any batch, no Python source needed."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

from kdcore.data.images import Images
from kdcore.exports.exporter import CannotExport, Deliverable
from kdcore.spec import ExportFormat, ExportOptions

MOST_IMAGES = 65_536
"""The largest batch of an exported file."""


@dataclass(frozen=True)
class TorchExport:
    """The exporter. The file's `distillery.json` has all facts: `torch.export.load(path, extra_files=...)`."""

    format: ExportFormat = "torch_export"
    file: str = "student.pt2"
    media_type: str = "application/octet-stream"
    runtime: str = "torch.export"

    def write(self, student: Deliverable, path: Path, options: ExportOptions, images: Images) -> None:
        notes = {"distillery.json": json.dumps(student.facts_of(options))}
        # Not into the file itself: an archive's folder is called like its file, and this one has a temporary name.
        content = io.BytesIO()
        with translating():
            torch.export.save(program(student, options), content, extra_files=notes)
        path.write_bytes(content.getbuffer())


def program(student: Deliverable, options: ExportOptions) -> torch.export.ExportedProgram:
    """Return the student's graph for any number of images, which is made once for all files. Raises CannotExport."""
    key = f"program {options.normalization}"
    if key not in student.made:
        batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
        images = torch.zeros(2, student.channels, *student.image_size)
        with translating():
            made = torch.export.export(
                student.network_of(options), (images,), dynamic_shapes=({0: batch},), strict=False
            )
        _forget_sources(made)
        student.made[key] = made
    found: torch.export.ExportedProgram = student.made[key]
    return found


def _forget_sources(made: torch.export.ExportedProgram) -> None:
    """Remove where in which file each operation was written: these are paths of this machine."""
    for module in made.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@contextmanager
def translating() -> Iterator[None]:
    """Turn what PyTorch's exporters raise into CannotExport, and keep their warnings out of the log."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MemoryError, OSError):
        raise
    except Exception as error:  # They raise whatever a network's code raises when it is traced.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotExport(lines[0][:300]) from error
