"""The files that a job delivers: the student (a safetensors file for plain PyTorch), the report and the spec."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from base.files import Written, write_text, write_whole
from base.references import ALONE_FILE, STUDENT_FILE
from kdcore import report
from kdcore.prepare import PreparedJob, Workspace
from kdcore.spec import Student
from kdcore.training import Outcome

WEIGHTS = "application/octet-stream"


def write_students(
    job: PreparedJob,
    workspace: Workspace,
    finished: Mapping[str, Mapping[str, Outcome]],
    summary: Mapping[str, Any],
) -> None:
    """Write the student, its peers if several learned from each other, and the student alone if the job trained it."""
    delivered, students = report.delivered(job, finished), job.spec.students
    path = workspace.out / STUDENT_FILE
    written = student(path, delivered.weights, students[0], job, summary["student"], delivered.members)
    workspace.announce("artifact", written, name=path.name, media_type=WEIGHTS)
    for number, peer in enumerate(students[1:], 2):
        path = workspace.out / f"student-{number}.safetensors"
        best = finished["student"][path.stem].best
        written = student(path, best, peer, job, summary["models"][path.stem])
        workspace.announce("artifact", written, name=path.name, media_type=WEIGHTS)
    if "alone" in finished:
        path = workspace.out / ALONE_FILE
        written = student(path, finished["alone"]["student"].best, students[0], job, summary["alone"])
        workspace.announce("artifact", written, name=path.name, media_type=WEIGHTS)


def write_documents(job: PreparedJob, workspace: Workspace, summary: Mapping[str, Any]) -> None:
    """Write the report and the resolved spec."""
    for name, content in (("report.json", summary), ("spec.json", job.spec.as_json())):
        written = write_text(workspace.out / name, json.dumps(content, indent=2) + "\n")
        workspace.announce("artifact", written, name=name, media_type="application/json")


def student(
    path: Path,
    weights: Mapping[str, Tensor],
    spec: Student,
    job: PreparedJob,
    metrics: Mapping[str, Any],
    members: int = 1,
) -> Written:
    """Write weights under the network's own names. The metadata's `distillery` is JSON with all facts for their use.

    Several members are an ensemble: each one's names begin with its number, `0.conv1.weight`, and the output is the
    mean of their probabilities.
    """
    preprocessing, dataset = spec.preprocessing, job.data.facts
    assert preprocessing is not None, "resolve() gives every student its normalisation"
    metadata = {
        "architecture": spec.architecture,
        "members": members,
        "num_classes": dataset.num_classes,
        "channels": dataset.channels,
        "image_size": dataset.image_size,
        "class_names": dataset.class_names,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "metrics": dict(metrics),
        "spec": job.spec.as_json(),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    notes = {"distillery": json.dumps(metadata), "format": "pt"}
    return write_whole(path, lambda to: _save(tensors, notes, to))


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
