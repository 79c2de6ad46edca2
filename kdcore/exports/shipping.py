"""From a trained student to files: write each, measure it, and deliver it or say why not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from base.files import Written, write_text, write_whole
from base.references import ALONE_FILE
from base.warning import WarningItem
from kdcore import report
from kdcore.data.images import Data
from kdcore.exports import safetensors
from kdcore.exports.exporter import CannotExport, Deliverable, Exporter, FileRow, missing
from kdcore.prepare import PreparedJob, Workspace
from kdcore.spec import ExportFormat, ExportOptions
from kdcore.training import Outcome

EXPORTERS: dict[ExportFormat, Exporter] = {
    "safetensors": safetensors.Safetensors(),
}
UNAVAILABLE, MISMATCH = "export_unavailable", "export_mismatch"


def write_students(
    job: PreparedJob,
    workspace: Workspace,
    finished: Mapping[str, Mapping[str, Outcome]],
    summary: Mapping[str, Any],
) -> list[FileRow]:
    """Write the student's files, its peers if several learned from each other, and the student alone if the job trained
    it. Returns the rows of the student's files."""
    delivered, spec, facts = report.delivered(job, finished), job.spec, job.data.facts
    ranges = finished["student"]["student"].ranges or None
    student = Deliverable.of(
        spec, facts, delivered.weights, summary["student"], delivered.members, activation_ranges=ranges
    )
    formats = tuple(dict.fromkeys(("safetensors", *spec.export)))
    rows = ship(student, formats, spec.export_options, job.data, workspace)
    for number, peer in enumerate(spec.students[1:], 2):
        name = f"student-{number}"
        best, metrics = finished["student"][name].best, summary["models"][name]
        _write_weights(Deliverable.of(spec, facts, best, metrics, student=peer), f"{name}.safetensors", workspace)
    if "alone" in finished:
        alone = Deliverable.of(spec, facts, finished["alone"]["student"].best, summary["alone"])
        _write_weights(alone, ALONE_FILE, workspace)
    return rows


def _write_weights(student: Deliverable, name: str, workspace: Workspace) -> None:
    written = write_whole(workspace.out / name, lambda path: safetensors.write(student, path))
    workspace.announce("artifact", written, name=name, media_type=safetensors.Safetensors.media_type)


def write_documents(job: PreparedJob, workspace: Workspace, summary: Mapping[str, Any]) -> None:
    """Write the report and the resolved spec."""
    for name, content in (("report.json", summary), ("spec.json", job.spec.as_json())):
        written = write_text(workspace.out / name, json.dumps(content, indent=2) + "\n")
        workspace.announce("artifact", written, name=name, media_type="application/json")


def ship(
    student: Deliverable,
    formats: Sequence[ExportFormat],
    options: ExportOptions,
    data: Data,
    workspace: Workspace,
) -> list[FileRow]:
    """Write a student's files in the formats, measure each in its own runtime, and announce those that are good.

    Needs no training: any weights of a job will do. Returns a row for each file; one that is refused has a row, a
    warning, and no artifact.
    """
    return [_shipped(EXPORTERS[name], student, options, data, workspace) for name in formats]


def _shipped(
    exporter: Exporter, student: Deliverable, options: ExportOptions, data: Data, workspace: Workspace
) -> FileRow:
    row = make(exporter, student, options, data, workspace)
    path = workspace.out / exporter.file
    if row.refused is None:
        assert row.bytes is not None and row.sha256 is not None
        written = Written(path, row.bytes, row.sha256)
        workspace.announce("artifact", written, name=exporter.file, media_type=exporter.media_type)
    else:
        path.unlink(missing_ok=True)
        workspace.warn(WarningItem(row.refused["code"], "/export", row.refused["message"], row.refused["hint"]))
    return row


def make(exporter: Exporter, student: Deliverable, options: ExportOptions, data: Data, workspace: Workspace) -> FileRow:
    """Write one file into the workspace and measure it. Returns its row; `refused` says why it is not delivered."""
    if absent := missing(exporter):
        text = f"{exporter.file} cannot be made: {' and '.join(absent)} is not installed on this worker"
        hint = "install the extra of that format on the workers (docs/shipping.md), and export again"
        return _refused(exporter, UNAVAILABLE, text, hint)
    try:
        written = write_whole(
            workspace.out / exporter.file, lambda to: exporter.write(student, to, options, data.train)
        )
    except CannotExport as error:
        text = f"{exporter.file} cannot be made of {student.architecture}: {error}"
        return _refused(exporter, UNAVAILABLE, text, "take another format, or another network")
    return FileRow(exporter.file, exporter.format, written.bytes, written.sha256, exporter.runtime)


def _refused(exporter: Exporter, code: str, message: str, hint: str) -> FileRow:
    refused = {"code": code, "message": message, "hint": hint}
    return FileRow(exporter.file, exporter.format, None, None, exporter.runtime, refused=refused)
