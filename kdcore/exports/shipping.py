"""From a trained student to files: write each, measure it, and deliver it or say why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from base.files import Written, write_text, write_whole
from base.references import ALONE_FILE
from base.warning import WarningItem
from kdcore import report
from kdcore.checkpoint import Stopped
from kdcore.data.images import Data
from kdcore.exports import measuring, onnx, onnx_int8, openvino, safetensors, student_source, torch_export
from kdcore.exports.exporter import CannotExport, Deliverable, Exporter, FileRow, Quantized
from kdcore.measure.grading import Outcome
from kdcore.prepare import PreparedJob, Workspace
from kdcore.spec import INT8, ExportFormat, ExportOptions
from kdcore.spec.shipping import missing

EXPORTERS: dict[ExportFormat, Exporter] = {
    "safetensors": safetensors.Safetensors(),
    "onnx": onnx.Onnx(),
    "onnx_int8": onnx_int8.OnnxInt8(),
    "torch_export": torch_export.TorchExport(),
    "openvino": openvino.OpenVino(),
}
UNAVAILABLE, MISMATCH, OVERFLOWS = "export_unavailable", "export_mismatch", "int8_overflows"
TO_INSTALL = (
    "install the extra of that format on the workers (docs/shipping.md) and export again, or take another format"
)
TO_EXPORT_OTHERWISE = "take another format"
TO_LOSE_LESS = (
    "for int8: more export_options.calibration_images, training for it with quantization, or a larger "
    "export_options.tolerance"
)
TO_NOT_OVERFLOW = "ship it to CPUs that do not overflow; to x86 CPUs without VNNI, ship the float file"


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
        outcome, metrics = finished["student"][name], summary["models"][name]
        one = Deliverable.of(spec, facts, outcome.best, metrics, student=peer, activation_ranges=outcome.ranges or None)
        _write_weights(one, f"{name}.safetensors", workspace)
    if "alone" in finished:
        outcome = finished["alone"]["student"]
        alone = Deliverable.of(spec, facts, outcome.best, summary["alone"], activation_ranges=outcome.ranges or None)
        _write_weights(alone, ALONE_FILE, workspace)
    return rows


def _write_weights(student: Deliverable, name: str, workspace: Workspace) -> None:
    written = write_whole(workspace.out / name, lambda path: safetensors.write(student, path))
    workspace.announce("artifact", written, name=name, media_type=safetensors.Safetensors.media_type)


def ship(
    student: Deliverable,
    formats: Sequence[ExportFormat],
    options: ExportOptions,
    data: Data,
    workspace: Workspace,
) -> list[FileRow]:
    """Write a student's files in the formats, measure each in its own runtime, and announce those that are good; beside
    them always its `student.py`.

    Needs no training: any weights of a job will do. Returns a row for each file; one that is refused has a row, a
    warning, and no artifact. Raises Stopped between two files if that was requested.
    """
    source = write_text(workspace.out / student_source.NAME, student_source.student_source(student))
    rows = []
    for name in formats:
        if workspace.stop_requested:
            raise Stopped
        rows.append(_shipped(EXPORTERS[name], student, options, data, workspace))
    workspace.announce("artifact", source, name=student_source.NAME, media_type=student_source.MEDIA_TYPE)
    return rows


def _shipped(
    exporter: Exporter, student: Deliverable, options: ExportOptions, data: Data, workspace: Workspace
) -> FileRow:
    row = make(exporter, student, options, data, workspace)
    path = workspace.out / exporter.file
    if row.refused is None:
        assert row.bytes is not None and row.sha256 is not None
        written = Written(path, row.bytes, row.sha256)
        workspace.announce("artifact", written, name=exporter.file, media_type=exporter.media_type)
        if row.accuracy_without_overflow is not None and row.accuracy is not None:
            _warn_of_overflow(row, row.accuracy, row.accuracy_without_overflow, options, workspace)
    else:
        path.unlink(missing_ok=True)
        workspace.warn(WarningItem(row.refused["code"], "/export", row.refused["message"], row.refused["hint"]))
    return row


def _warn_of_overflow(
    row: FileRow, here: float, elsewhere: float, options: ExportOptions, workspace: Workspace
) -> None:
    if here >= elsewhere - options.tolerance:
        return
    text = f"{row.name} is right on {here:.1%} of the test images on this worker's CPU ({row.cpu}), which has no VNNI: "
    text += f"sums of int8 overflow there. On CPUs with VNNI or AMX, and on ARM, it is right on {elsewhere:.1%}"
    workspace.warn(WarningItem(OVERFLOWS, "/export", text, TO_NOT_OVERFLOW))


def make(exporter: Exporter, student: Deliverable, options: ExportOptions, data: Data, workspace: Workspace) -> FileRow:
    """Write one file into the workspace and measure it. Returns its row; `refused` says why it is not delivered.

    It needs the student's `student.py` beside it.
    """
    row = FileRow(
        exporter.file, exporter.format, runtime=exporter.runtime, quantization=_quantization(exporter, student)
    )
    if absent := missing(exporter.format):
        text = f"{exporter.file} cannot be made: {', '.join(absent)} is not installed on this worker"
        return row.but_refused(UNAVAILABLE, text, TO_INSTALL)
    try:
        written = write_whole(
            workspace.out / exporter.file, lambda to: exporter.write(student, to, options, data.train)
        )
    except CannotExport as error:
        text = f"{exporter.file} cannot be made of {student.architecture}: {error}"
        return row.but_refused(UNAVAILABLE, text, TO_EXPORT_OTHERWISE)
    row = replace(row, bytes=written.bytes, sha256=written.sha256)
    if not options.measure:
        return row
    return _measured(row, student, options, data, workspace)


def _quantization(exporter: Exporter, student: Deliverable) -> Quantized | None:
    if exporter.format not in INT8:
        return None
    return "after_training" if student.activation_ranges is None else "aware"


def _measured(row: FileRow, student: Deliverable, options: ExportOptions, data: Data, workspace: Workspace) -> FileRow:
    """Return the row with the figures of its file, or refused if these are not the student's."""
    path, source = workspace.out / row.name, workspace.out / student_source.NAME
    expected = measuring.reference(student, data.test, options.batch_size)
    try:
        found = measuring.measure(row.runtime, path, source, student, options, data.test, workspace.lines.working)
        without_overflow = None
        if row.quantization is not None and measuring.int8_overflows():
            without_overflow = measuring.measure(
                row.runtime, path, source, student, options, data.test, workspace.lines.working, fused=False
            ).accuracy
    except measuring.FileFailed as error:
        return row.but_refused(MISMATCH, f"{row.runtime} cannot run {row.name}: {error}", TO_EXPORT_OTHERWISE)
    row = replace(
        row,
        runtime=f"{row.runtime} {found.version}",
        accuracy=found.accuracy,
        accuracy_without_overflow=without_overflow,
        agreement=found.agreement,
        images=found.images,
        latency=found.latency,
        batches_left_out=found.batches_left_out,
        threads=found.threads,
        cpu=found.cpu,
        peak_memory_bytes=found.peak_memory_bytes,
    )
    if row.quantization is None and not found.difference <= measuring.NUMERIC_TOLERANCE:
        text = f"{row.name} does not compute what the student does: its logits differ by {found.difference:.2g} of the "
        text += f"largest one, and rounding explains {measuring.NUMERIC_TOLERANCE:g}"
        return row.but_refused(MISMATCH, text, TO_EXPORT_OTHERWISE)
    assert row.judged_accuracy is not None
    if row.judged_accuracy < expected.accuracy - options.tolerance:
        text = f"{row.name} is right on {row.judged_accuracy:.1%} of the test images and the student on "
        text += (
            f"{expected.accuracy:.1%}: the difference is more than export_options.tolerance, {options.tolerance:.1%}"
        )
        return row.but_refused(MISMATCH, text, TO_LOSE_LESS)
    return row
