"""The shape of every answer, as models, and the JSON response that carries it.

The models document the answers, and tests compare the answers with them. The service sends dicts with the fields of
the models (`View.of`), because building and serializing models takes twice as long.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.responses import Response

from base.errors import CODES
from base.jobs import Status, allowed_actions
from kdcore.catalog import DatasetFacts, ModelFacts
from store.artifacts import Artifact
from store.attempts import Attempt
from store.records import Job
from store.registry import Dataset, Model
from store.uploads import Upload
from store.workers import Reason, Waiting, Worker

T = TypeVar("T")

Time = Annotated[str, "A record has seconds since 1970 here."]
Code = Literal[CODES]  # type: ignore[valid-type]


class Json(Response):
    """A response from dicts and lists. The `response_model` of its route documents it."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(content), status, headers)


def page(data: Sequence[Any], following: str | None = None) -> Json:
    """The response of a list; `Page` documents it."""
    return Json({"data": data, "next": following})


def iso(seconds: float | None) -> str | None:
    """Seconds since 1970, as the database counts, to ISO-8601 in UTC with milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class View(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, record: Any, /, *args: Any, **computed: Any) -> dict[str, Any]:
        """The answer for a record. Each field is in `computed`, or the record's attribute of that name.

        A view with computed fields overrides this; `*args` lets it take further arguments.
        """
        values = {**vars(record), **computed}
        answer = {name: values[name] for name in cls.__pydantic_fields__}
        for name in _times(cls):
            answer[name] = iso(answer[name])
        return answer


@cache
def _times(view: type[View]) -> list[str]:
    """The fields of type `Time`."""
    types = get_type_hints(view, include_extras=True)
    return [name for name in view.model_fields if Time in (types[name], *get_args(types[name]))]


class Page(View, Generic[T]):
    """One page of a list. To get the page after it, send `next` as `after`."""

    data: list[T]
    next: str | None = None


class ErrorView(View):
    """Why a job failed. The list of codes is closed."""

    code: Code
    message: str
    retryable: bool
    hint: str | None = None


class WaitingView(View):
    """Why a queued job has not started."""

    reason: Reason = Field(
        description="`backing_off`: an attempt failed, another follows. `out_of_disk_space`: no worker has enough."
    )
    message: str
    until: Time | None = Field(description="When the job is due again; null if that is not known.")


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
    """A job. `spec` is the body that was sent; `resolved_spec` is what runs, with every default written out."""

    id: str
    name: str | None
    status: Status
    phase: str | None = Field(description="The phase of a running job.")
    requested: Literal["cancel", "pause"] | None = Field(description="Requested of a running job and not yet done.")
    allowed_actions: list[str] = Field(
        description="The actions that are allowed now, of cancel, pause, resume, retry, delete."
    )
    method: str = Field(description="The names of its methods, as in kd+attention.")
    progress: dict[str, Any] | None
    queue_position: int | None = Field(description="1 is next. Null unless the job is queued and due.")
    waiting: WaitingView | None = Field(description="Why it has not started. Null unless it is queued.")
    priority: int = Field(description="A job with a higher priority starts first.")
    not_before: Time | None = Field(description="When a job that backs off is due again.")
    deadline_at: Time | None = Field(description="It fails with deadline_exceeded if it has not ended by then.")
    attempts_without_progress: int = Field(description="Attempts since the last new checkpoint; `/attempts` lists all.")
    max_attempts: int
    checkpoint_step: int | None = Field(description="The newest step that it can resume from.")
    spec: dict[str, Any]
    resolved_spec: dict[str, Any]
    result: dict[str, Any] | None = Field(description="The report: teacher, student, the student alone, and the gain.")
    error: ErrorView | None
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    links: Links

    @classmethod
    def of(cls, job: Job, waiting: Waiting | None = None) -> dict[str, Any]:
        """`waiting`: of a queued job."""
        here = f"/v1/jobs/{job.id}"
        links = {name: f"{here}/{name}" for name in Links.__pydantic_fields__}
        return super().of(
            job,
            allowed_actions=allowed_actions(job.status, job.requested),
            queue_position=waiting.position if waiting else None,
            waiting=WaitingView.of(waiting) if waiting else None,
            links={**links, "self": here, "stream": f"{here}/events/stream"},
        )


class AttemptView(View):
    """One attempt at a job: its worker, the steps that it began and ended with, and how it ended."""

    attempt: int = Field(description="Counts from 1; `/logs?attempt=` takes this number.")
    attempts_without_progress: int = Field(description="Counts from 1 again after each new checkpoint.")
    worker: str
    device: str | None
    started_at: Time
    ended_at: Time | None
    how: Literal["succeeded", "failed", "cancelled", "paused", "released", "lost"] | None = Field(
        description="`released`: returned to the queue, not counted. `lost`: its lease expired. Null while it runs."
    )
    first_step: int | None = Field(description="The checkpoint that it resumed from; null if it had none.")
    last_step: int | None = Field(description="The newest checkpoint at its end.")

    @classmethod
    def of(cls, attempt: Attempt) -> dict[str, Any]:
        return super().of(attempt, attempt=attempt.fence, worker=attempt.owner)


class EventView(View):
    seq: int = Field(description="Counts from 1 within the job, without gaps.")
    at: Time
    type: str
    data: dict[str, Any]


class MetricsView(View):
    """Curves by trial and key; each point is [step, value]. Trials are `student`, `alone` (the student without its
    teacher), networks between teacher and student (`assistant-1`, `generation-2`), and stages that come before the
    labels (`student/fsp`)."""

    series: dict[str, dict[str, list[tuple[int, float | None]]]]


class ArtifactView(View):
    name: str
    bytes: int
    sha256: str
    media_type: str
    href: str

    @classmethod
    def of(cls, artifact: Artifact) -> dict[str, Any]:
        return super().of(artifact, href=f"/v1/jobs/{artifact.job_id}/artifacts/{artifact.name}")


class Retry(View):
    """Where a retried job starts."""

    start: Literal["checkpoint", "scratch"] = Field(
        default="checkpoint",
        alias="from",
        description="`checkpoint`: at its newest checkpoint. `scratch`: its checkpoints and curves are deleted.",
    )


class UploadView(View):
    id: str
    filename: str | None
    offset: int
    bytes: int | None = Field(description="The size of the whole file.")
    status: Literal["open", "complete"]
    blob: str | None = Field(description="Names the bytes of a complete upload when a model or data set is registered.")

    @classmethod
    def of(cls, upload: Upload) -> dict[str, Any]:
        return super().of(upload, blob=f"sha256:{upload.sha256}" if upload.status == "complete" else None)


class PreprocessingView(View):
    mean: list[float] = Field(min_length=1, max_length=4)
    std: list[float] = Field(min_length=1, max_length=4)


class NewModel(View):
    """A teacher's checkpoint that has been uploaded."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    blob: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    architecture: str | None = Field(default=None, description="Not needed if the file's metadata has it.")
    preprocessing: PreprocessingView | None = Field(default=None, description="Default: the file's own, if it has one.")


class ModelView(View):
    id: str
    name: str
    blob: str
    facts: ModelFacts
    created_at: Time

    @classmethod
    def of(cls, model: Model) -> dict[str, Any]:
        return super().of(model, blob=f"sha256:{model.sha256}")


class NewDataset(View):
    """A data set that has been uploaded: `.npz` arrays, or an archive with one folder per class. If it has no labels, a
    student can only be distilled onto it, together with a labelled data set."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    blob: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    image_size: int | None = Field(
        default=None, ge=4, le=1024, description="Height and width that images of different sizes are brought to."
    )


class DatasetView(View):
    id: str | None = Field(description="Null for a built-in data set.")
    name: str
    blob: str | None
    facts: DatasetFacts
    created_at: Time | None

    @classmethod
    def of(cls, dataset: Dataset) -> dict[str, Any]:
        return super().of(dataset, blob=f"sha256:{dataset.sha256}")


class Parameters(View):
    teacher: int | None = Field(description="Of all teachers together.")
    student: int | None = Field(description="Of the first, if several learn from each other.")


class Estimate(View):
    """Only what is known before anything has run; null is unknown, not zero."""

    steps: int | None = Field(
        description="Optimizer steps of the whole job: of every stage, assistant, generation and trained baseline."
    )
    parameters: Parameters
    compression: float | None = Field(description="The teacher's parameters divided by the student's.")


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
    seen_s: float = Field(description="Seconds from the slot's last activity to the worker's `seen_at`.")


class WorkerView(View):
    id: str
    host: str
    alive: bool = Field(description="It sent a heartbeat within a lease, and not all of its slots are stuck.")
    devices: list[DeviceView]
    current_job: str | None
    started_at: Time
    seen_at: Time = Field(description="Its last heartbeat.")

    @classmethod
    def of(cls, worker: Worker, lease_s: float) -> dict[str, Any]:
        return super().of(worker, alive=worker.consumes(lease_s))


class UsageView(View):
    files: int
    bytes: int


class RemovedView(View):
    count: int
    bytes: int


class CollectionView(View):
    """One run of the collector, which deletes files that no row names any more."""

    id: str
    host: str
    began_at: Time
    ended_at: Time | None = Field(description="Null while it runs, and if it was killed.")
    removed: dict[str, RemovedView] | None = Field(
        description="By kind. What is moved to the trash (`to_trash`) is deleted by a later run."
    )
    error: str | None = Field(description="What the run could not do; it did the rest.")


class StorageView(View):
    usage: dict[str, UsageView] = Field(description="By kind: blobs, checkpoints, logs, uploads, trash, cache.")
    free_bytes: int = Field(description="Free disk space for files.")
    min_free_bytes: int = Field(description="With less free disk space, no job is started.")
    collections: list[CollectionView] = Field(description="The newest first.")
