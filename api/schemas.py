"""What answers look like. The models document and are tested against; the `of` functions write the same as dicts."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from api.answers import iso
from base.jobs import Status, allowed_actions
from kdcore.catalog import DatasetFacts, ModelFacts
from store.attempts import Attempt
from store.events import Event
from store.records import Job
from store.registry import Dataset, Model
from store.uploads import Upload
from store.workers import Waiting

T = TypeVar("T")


class View(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Page(View, Generic[T]):
    """One page of a list; send `next` as `after` for the following one."""

    data: list[T]
    next: str | None = None


class ErrorView(View):
    """Why a job failed; the code is one of a closed list."""

    code: Literal[
        "spec_invalid", "teacher_mismatch", "dataset_unreadable", "out_of_memory", "loss_diverged",
        "deadline_exceeded", "worker_lost", "storage_full", "internal",
    ]  # fmt: skip
    message: str
    retryable: bool
    hint: str | None = None


class WaitingView(View):
    """Why a queued job has not started."""

    reason: Literal["backing_off", "no_worker", "out_of_disk_space", "behind_others", "starting"] = Field(
        description="`backing_off`: an attempt failed, another follows. `out_of_disk_space`: no worker has enough."
    )
    message: str
    until: str | None = Field(description="When it is due again; null where nobody can know.")


class Links(View):
    self: str
    attempts: str
    events: str
    stream: str
    metrics: str
    logs: str
    artifacts: str
    checkpoint: str


class JobView(View):
    """A job as it stands. `spec` is what was sent, `resolved_spec` what runs, with every default spelled out."""

    id: str
    name: str | None
    status: Status
    phase: str | None = Field(description="What a running job is at.")
    requested: Literal["cancel", "pause"] | None = Field(description="Asked of a running job, and not yet done.")
    allowed_actions: list[str] = Field(
        description="The moves that the status allows now: cancel, pause, resume, retry, delete."
    )
    method: str = Field(description="Names of all its methods, as in kd+attention.")
    progress: dict[str, Any] | None
    queue_position: int | None = Field(description="1 is next; only while queued and due: who backs off has no place.")
    waiting: WaitingView | None = Field(description="Why it has not started; only while queued.")
    priority: int = Field(description="The higher goes first.")
    not_before: str | None = Field(description="A job that backs off is due again then.")
    deadline_at: str | None = Field(description="It fails with deadline_exceeded if it has not ended by then.")
    attempts_without_progress: int = Field(description="Attempts since the last new checkpoint; `/attempts` lists all.")
    max_attempts: int
    checkpoint_step: int | None = Field(description="The furthest step that it can go on from.")
    spec: dict[str, Any]
    resolved_spec: dict[str, Any]
    result: dict[str, Any] | None = Field(description="The report: teacher, student, the student alone, and the gain.")
    error: ErrorView | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    links: Links


def job_view(job: Job, waiting: Waiting | None = None) -> dict[str, Any]:
    """`waiting`: of a queued job."""
    here = f"/v1/jobs/{job.id}"
    return {
        "id": job.id,
        "name": job.name,
        "status": job.status,
        "phase": job.phase,
        "requested": job.requested,
        "allowed_actions": allowed_actions(job.status, job.requested),
        "method": job.method,
        "progress": job.progress,
        "queue_position": waiting.position if waiting else None,
        "waiting": _waiting_view(waiting) if waiting else None,
        "priority": job.priority,
        "not_before": iso(job.not_before),
        "deadline_at": iso(job.deadline_at),
        "attempts_without_progress": job.attempts_without_progress,
        "max_attempts": job.max_attempts,
        "checkpoint_step": job.checkpoint_step,
        "spec": job.spec,
        "resolved_spec": job.resolved_spec,
        "result": job.result,
        "error": job.error,
        "created_at": iso(job.created_at),
        "started_at": iso(job.started_at),
        "finished_at": iso(job.finished_at),
        "links": {
            "self": here,
            "attempts": f"{here}/attempts",
            "events": f"{here}/events",
            "stream": f"{here}/events/stream",
            "metrics": f"{here}/metrics",
            "logs": f"{here}/logs",
            "artifacts": f"{here}/artifacts",
            "checkpoint": f"{here}/checkpoint",
        },
    }


def _waiting_view(waiting: Waiting) -> dict[str, Any]:
    return {"reason": waiting.reason, "message": waiting.message, "until": iso(waiting.until)}


class AttemptView(View):
    """One claim of a job: who tried, from where to where, and how it ended."""

    attempt: int = Field(description="Counts from 1; `/logs?attempt=` takes this number.")
    attempts_without_progress: int = Field(description="Counts from 1 again after each new checkpoint.")
    worker: str
    device: str | None
    started_at: str
    ended_at: str | None
    how: Literal["succeeded", "failed", "cancelled", "paused", "released", "lost"] | None = Field(
        description="`released`: handed back, nothing spent. `lost`: its worker fell silent. Null while it runs."
    )
    first_step: int | None = Field(description="The checkpoint that it went on from; null from scratch.")
    last_step: int | None = Field(description="The furthest checkpoint at its end.")


def attempt_view(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.fence,
        "attempts_without_progress": attempt.attempts_without_progress,
        "worker": attempt.owner,
        "device": attempt.device,
        "started_at": iso(attempt.started_at),
        "ended_at": iso(attempt.ended_at),
        "how": attempt.how,
        "first_step": attempt.first_step,
        "last_step": attempt.last_step,
    }


class EventView(View):
    seq: int = Field(description="Counts from 1 within the job, without gaps.")
    at: str
    type: str
    data: dict[str, Any]


def event_view(event: Event) -> dict[str, Any]:
    return {"seq": event.seq, "at": iso(event.at), "type": event.type, "data": event.data}


class MetricsView(View):
    """Series by trial and key; each point is [step, value]. Trials are `student` and `alone`, networks on the way to
    the student (`assistant-1`, `generation-2`), and stages before the labels (`student/fsp`)."""

    series: dict[str, dict[str, list[tuple[int, float | None]]]]


class ArtifactView(View):
    name: str
    bytes: int
    sha256: str
    media_type: str
    href: str


class Retry(View):
    """Where a retried job goes on."""

    start: Literal["checkpoint", "scratch"] = Field(
        default="checkpoint",
        alias="from",
        description="`checkpoint`: where it got to. `scratch`: its checkpoints and curves are forgotten.",
    )


class UploadView(View):
    id: str
    filename: str | None
    offset: int
    bytes: int | None = Field(description="The whole size.")
    status: Literal["open", "complete"]
    blob: str | None = Field(description="What a model or data set is registered with, once complete.")


def upload_view(upload: Upload) -> dict[str, Any]:
    return {
        "id": upload.id,
        "filename": upload.filename,
        "offset": upload.offset,
        "bytes": upload.bytes,
        "status": upload.status,
        "blob": f"sha256:{upload.sha256}" if upload.status == "complete" else None,
    }


class PreprocessingView(View):
    mean: list[float] = Field(min_length=1, max_length=4)
    std: list[float] = Field(min_length=1, max_length=4)


class NewModel(View):
    """A teacher's checkpoint that was uploaded before."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    blob: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    architecture: str | None = Field(default=None, description="May be left out where the file's metadata says it.")
    preprocessing: PreprocessingView | None = Field(
        default=None, description="Default: the file's own, where it says one."
    )


class ModelView(View):
    id: str
    name: str
    blob: str
    facts: ModelFacts
    created_at: str


def model_view(model: Model) -> dict[str, Any]:
    return {
        "id": model.id,
        "name": model.name,
        "blob": f"sha256:{model.sha256}",
        "facts": model.facts,
        "created_at": iso(model.created_at),
    }


class NewDataset(View):
    """A data set that was uploaded before: `.npz` arrays, or an archive of one folder a class. One without labels can
    only be distilled onto, beside a labelled one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    blob: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    image_size: int | None = Field(
        default=None, ge=4, le=1024, description="Height and width that images of differing sizes get."
    )


class DatasetView(View):
    id: str | None = Field(description="None for a built-in set.")
    name: str
    blob: str | None
    facts: DatasetFacts
    created_at: str | None


def dataset_view(dataset: Dataset) -> dict[str, Any]:
    return {
        "id": dataset.id,
        "name": dataset.name,
        "blob": f"sha256:{dataset.sha256}",
        "facts": dataset.facts,
        "created_at": iso(dataset.created_at),
    }


class Parameters(View):
    teacher: int | None = Field(description="Of all teachers together.")
    student: int | None = Field(description="Of the first, where several learn from each other.")


class Estimate(View):
    """Only what is known before anything has run; null is unknown, not zero."""

    steps: int | None = Field(
        description="Optimizer steps of the whole job: of every stage, assistant, generation and trained baseline."
    )
    parameters: Parameters
    compression: float | None = Field(description="Teacher's parameters over the student's.")


class ValidationView(View):
    valid: bool
    errors: list[dict[str, Any]]
    resolved_spec: dict[str, Any] | None
    estimate: Estimate | None


class DeviceView(View):
    """One slot of a worker: a device that runs one job at a time."""

    name: str
    job: str | None
    state: Literal["idle", "busy", "out_of_disk_space", "stuck"] = Field(
        description="`out_of_disk_space`: too little to start a job. `stuck`: it neither polls for jobs nor runs one."
    )
    seen_s: float = Field(description="Seconds from its last proof that it consumes to the worker's `seen_at`.")


class WorkerView(View):
    id: str
    host: str
    alive: bool = Field(description="Heard within a lease, with a slot that proves that it takes jobs.")
    devices: list[DeviceView]
    current_job: str | None
    started_at: str
    seen_at: str = Field(description="Its last sign of life.")


class UsageView(View):
    files: int
    bytes: int


class RemovedView(View):
    count: int
    bytes: int


class CollectionView(View):
    """One run of the collector, which removes what no row needs any more."""

    id: str
    host: str
    began_at: str
    ended_at: str | None = Field(description="Null while it runs, and where it was killed.")
    removed: dict[str, RemovedView] | None = Field(
        description="By kind. What goes to the trash (`to_trash`) is removed for good by a later run."
    )
    error: str | None = Field(description="What it could not do; it did the rest.")


class StorageView(View):
    usage: dict[str, UsageView] = Field(description="By kind: blobs, checkpoints, logs, uploads, trash, cache.")
    free_bytes: int = Field(description="Room for files.")
    min_free_bytes: int = Field(description="With less, no job is started.")
    collections: list[CollectionView] = Field(description="The newest first.")
