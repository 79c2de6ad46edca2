"""What int8 costs a student, as exported files show it: float beside int8, after training and trained for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from base.files import write_text
from kdcore.exports import student_source
from kdcore.exports.exporter import Deliverable, FileRow
from kdcore.exports.shipping import EXPORTERS, make
from kdcore.measure.grading import Outcome
from kdcore.prepare import PreparedJob, Workspace
from kdcore.spec import INT8, ExportFormat
from kdcore.spec.plan import aware_epochs

DELIVERED, BEFORE = "delivered", "before"
"""Whose file a row is: the student's that is delivered, or that of the same student at the best of the epochs before it
trained for int8."""


def int8_table(
    job: PreparedJob, workspace: Workspace, finished: Mapping[str, Mapping[str, Outcome]], files: Sequence[FileRow]
) -> dict[str, Any] | None:
    """Return the report's `quantization`; None if no file of the job is int8.

    `aware_epochs` are those that trained for int8. A row is a file in figures, and `lost` is what its int8 has lost of
    the accuracy of the same weights in float, without what sums lose that overflow on this CPU. The weights before the
    epochs for int8 are quantised after training, so that both ways stand side by side. They have not had the last
    epochs, in which a schedule ends: what they lose may be compared, their accuracy is lower for two reasons. A
    training of all epochs in float is a job of its own.
    """
    if not set(job.spec.export) & set(INT8):
        return None
    delivered = [row for row in files if row.format in _formats(job)]
    outcome, epochs = finished["student"]["student"], aware_epochs(job.spec)
    before = _before(job, workspace, outcome, delivered) if outcome.before else []
    return {"aware_epochs": epochs, "rows": [*_rows(BEFORE, before), *_rows(DELIVERED, delivered)]}


def _formats(job: PreparedJob) -> tuple[ExportFormat, ...]:
    """Return the formats of the table: ONNX for float, if it is delivered, else safetensors."""
    int8 = [name for name in job.spec.export if name in INT8]
    return ("onnx" if "onnx" in job.spec.export else "safetensors", *int8)


def _before(
    job: PreparedJob, workspace: Workspace, outcome: Outcome, delivered: Sequence[FileRow]
) -> Iterator[FileRow]:
    """Yield the rows of the weights before the epochs for int8. Their files are measured, and not delivered."""
    student = Deliverable.of(job.spec, job.data.facts, outcome.before, {})
    with tempfile.TemporaryDirectory(dir=workspace.out) as folder:
        here = replace(workspace, out=Path(folder))
        write_text(here.out / student_source.NAME, student_source.student_source(student))
        for row in delivered:
            yield make(EXPORTERS[row.format], student, job.spec.export_options, job.data, here)


def _rows(student: str, files: Iterable[FileRow]) -> Iterator[dict[str, Any]]:
    in_float: float | None = None
    for file in files:
        lost = None
        if file.quantization is None:
            in_float = file.accuracy
        elif in_float is not None and file.judged_accuracy is not None:
            lost = in_float - file.judged_accuracy
        yield {
            "student": student,
            "format": file.format,
            "quantization": file.quantization,
            "bytes": file.bytes,
            "accuracy": file.accuracy,
            "accuracy_without_overflow": file.accuracy_without_overflow,
            "agreement": file.agreement,
            "images": file.images,
            "lost": lost,
            "refused": file.refused,
        }
