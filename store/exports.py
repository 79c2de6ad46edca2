"""The weights of a job's student, for jobs that take them: its file, or a checkpoint that is kept for them.

A job that goes on deletes its old checkpoints. So the file of one gets a second name among the blobs (`keep`), and the
resolved spec of the job that takes it names the blob, which keeps it until that job has succeeded or is deleted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection

from base.references import STUDENT_FILE
from store import artifacts, checkpoints
from store.checkpoints import Checkpoint
from store.errors import BlobMismatch, NotExportable, NotFound
from store.file_store import FileStore
from store.records import Job

TRIES = 3
"""How often the checkpoints of a job are read, which replaces them while it runs."""


@dataclass(frozen=True)
class Weights:
    """A file with a student's weights. Of a job that has succeeded it is the student's own; else a checkpoint."""

    sha256: str
    format: Literal["checkpoint", "safetensors"]
    step: int | None = None
    checkpoint: Checkpoint | None = None
    """The checkpoint's row; None for a student's file, which is among the blobs already."""


def of_job(connection: Connection, job: Job, which: Literal["best", "last"]) -> list[Weights]:
    """Return the files that have these weights of a job's student, the newest first.

    Raises NotExportable, with what can be exported now, if there is none.
    """
    if job.kind != "distillation":
        raise NotExportable(f"a job of the kind {job.kind} has no student", [])
    kept = [
        Weights(one.sha256, "checkpoint", one.step, one) for one in checkpoints.list_checkpoints(connection, job.id)
    ]
    if job.status == "succeeded":
        if which == "best":
            return [_of_student(connection, job)]
        if not kept:
            text = "the job has succeeded, and its checkpoints were deleted: only its best epoch is left"
            raise NotExportable(text, ["best"])
        return kept[:1]  # An earlier one would not be the last.
    if not kept:
        text = f"the job is {job.status} and has no checkpoint: its student has no weights yet"
        if job.status in ("failed", "cancelled"):
            text = f"the job is {job.status} and has no checkpoint, or it was deleted: retry the job"
        raise NotExportable(text, [])
    return kept


def _of_student(connection: Connection, job: Job) -> Weights:
    try:
        return Weights(artifacts.get(connection, job.id, STUDENT_FILE).sha256, "safetensors")
    except NotFound:
        raise NotExportable(f"the job has no {STUDENT_FILE}", []) from None


def keep(files: FileStore, read: Callable[[], list[Weights]]) -> Weights:
    """Return weights whose file is among the blobs. `read` reads what `of_job` returns: a checkpoint may be replaced
    before it is kept, and a damaged one is passed over.

    It blocks, since it reads the whole file. Call it again after the commit of what names the blob (`keep_again`).
    """
    damaged: list[str] = []
    for _ in range(TRIES):
        for weights in read():
            if weights.checkpoint is None:
                return weights
            try:
                files.share(files.folder / weights.checkpoint.path, weights.sha256)
                return weights
            except FileNotFoundError:
                continue
            except BlobMismatch:
                damaged.append(f"that of step {weights.step} is damaged")
    raise NotExportable(f"no checkpoint of the job can be kept: {'; '.join(damaged) or 'they are gone'}", [])


def keep_again(files: FileStore, weights: Weights) -> None:
    """Make sure of a blob after the commit of the row that names it: a collection on request does not wait, so it may
    have taken the blob between its file and its row. From now on nothing deletes it."""
    if weights.checkpoint is not None:
        try:
            files.share(files.folder / weights.checkpoint.path, weights.sha256)
        except (FileNotFoundError, BlobMismatch):
            return  # The attempt says that its input is not there.
