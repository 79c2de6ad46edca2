"""Answers made from the store's records, the JSON response class, and the models of request bodies.

The types in `base/wire.py` document the routes, and tests compare the answers with them; the service
sends plain dicts with their keys, because building and serializing models takes twice as long.
"""

import ast
import inspect
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

from pydantic import Field
from pydantic_core import to_json
from starlette.responses import Response

from base import wire
from base.jobs import WebhookEvent, allowed_actions
from base.references import DIGEST
from base.text import NAME, Text
from base.wire import (
    IS_TIME,
    ArtifactView,
    AttemptView,
    DeliveryView,
    InspectionProgress,
    JobSummary,
    JobView,
    KeyView,
    Links,
    MeasuredView,
    PredictionView,
    RefusalView,
    RegistrationState,
    ThumbnailsView,
    Time,
    UploadView,
    WaitingView,
    WarningView,
    WebhookView,
    WorkerView,
)
from kdcore.catalog import DatasetFacts, ModelFacts, ProgramFacts
from kdcore.spec import DataOptions, ExportOptions, Formats, Preprocessing, Scheduling
from kdcore.spec.inputs import Architecture, ClassMap, ClassNames, Part
from kdcore.spec.job import Labels
from kdcore.spec.kinds import Which
from kdcore.spec.vocabulary import JsonObject, at_most
from store.artifacts import Artifact
from store.attempts import Attempt
from store.keys import Key
from store.predictions import Prediction
from store.records import Job, ListedJob
from store.registry import Dataset, Entry, Model
from store.speeds import Speed
from store.uploads import Upload
from store.webhooks import Delivery, Webhook
from store.workers import Waiting, Worker

T = TypeVar("T")


def _describe_views() -> None:
    """Make the docstrings of the fields in `base/wire.py` their descriptions in the OpenAPI document.

    Pydantic can do that, too, but parses the whole file again for each class.
    """
    for statement in ast.parse(inspect.getsource(wire)).body:
        if not isinstance(statement, ast.ClassDef):
            continue
        fields = getattr(wire, statement.name).__annotations__
        for field, text in pairwise(statement.body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(description))):
                    described = Field(description=inspect.cleandoc(description))
                    fields[name] = Annotated[fields[name], described]


_describe_views()  # before a route documents its answer with one of them


class Json(Response):
    """A JSON response made of dicts and lists. The `response_model` of its route documents it."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(to_json(content, inf_nan_mode="null"), status, headers)


def page(data: Sequence[Any], following: str | None = None) -> Json:
    """Return the response of a list; `Page` documents it."""
    return Json({"data": data, "next": following})


def iso(seconds: float | None) -> str | None:
    """Return seconds since 1970 (the database's time) as ISO 8601 in UTC with milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# Answers


def view_of(view: Any, record: Any, /, **computed: Any) -> dict[str, Any]:
    """Return the answer for a record. Each field of the view is in `computed`, or is the record's attribute."""
    values = {**vars(record), **computed}
    answer = {name: values[name] for name in view.__annotations__}
    for name in _times(view):
        answer[name] = iso(answer[name])
    return answer


@cache
def _times(view: Any) -> list[str]:
    """Return the fields of type `Time`."""
    return [name for name, kind in view.__annotations__.items() if _is_time(kind)]


def _is_time(kind: Any) -> bool:
    return IS_TIME in getattr(kind, "__metadata__", ()) or any(map(_is_time, get_args(kind)))


def job_view(job: Job, waiting: Waiting | None = None) -> dict[str, Any]:
    """Return the answer for a job. `waiting`: the reason why a queued job waits."""
    here = f"/v1/jobs/{job.id}"
    links = {name: f"{here}/{name}" for name in Links.__annotations__}
    return view_of(
        JobView,
        job,
        allowed_actions=allowed_actions(job.status, job.requested),
        created_by=_sender(job),
        queue_position=waiting.position if waiting else None,
        waiting=view_of(WaitingView, waiting) if waiting else None,
        links={**links, "self": here, "stream": f"{here}/events/stream"},
    )


def _sender(job: Job | ListedJob) -> dict[str, Any] | None:
    return None if job.created_by_name is None else {"key_id": job.created_by, "key_name": job.created_by_name}


LISTED_MESSAGE = 1000
"""The length to which a list cuts the message of an error; the job itself has all of it."""


def job_summary(job: ListedJob, waiting: Waiting | None = None) -> dict[str, Any]:
    """Return a job's line in a list."""
    error = job.error
    if error is not None and len(error["message"]) > LISTED_MESSAGE:
        error = {**error, "message": error["message"][:LISTED_MESSAGE] + "…"}
    shown = {"dataset": None, "model": None, "teachers": [], "assistants": [], "students": [], **(job.summary or {})}
    return view_of(
        JobSummary,
        job,
        **shown,
        created_by=_sender(job),
        allowed_actions=allowed_actions(job.status, job.requested),
        queue_position=waiting.position if waiting else None,
        waiting=view_of(WaitingView, waiting) if waiting else None,
        error=error,
        warning_count=len(job.warnings),
    )


def attempt_view(attempt: Attempt) -> dict[str, Any]:
    return view_of(AttemptView, attempt, attempt=attempt.fence, worker=attempt.owner)


def artifact_view(artifact: Artifact) -> dict[str, Any]:
    return view_of(ArtifactView, artifact, href=f"/v1/jobs/{artifact.job_id}/artifacts/{artifact.name}")


def prediction_view(prediction: Prediction, message: str | None) -> dict[str, Any]:
    return view_of(PredictionView, prediction, job=prediction.job_id, message=message)


def benchmark_view(key: str, kept: Speed | None, job: Job | None) -> dict[str, Any]:
    """Return what is kept under a key, and the state of the newest job that measures it; at least one is there."""
    status = job.status if job is not None else "succeeded"
    return {
        "key": key,
        "status": status,
        "job": job.id if job is not None else kept.figures["job"] if kept is not None else "",
        "figures": None if kept is None else {name: value for name, value in kept.figures.items() if name != "job"},
        "error": None if job is None else job.error,
        "measured_at": None if kept is None else iso(kept.measured_at),
    }


def upload_view(upload: Upload) -> dict[str, Any]:
    return view_of(UploadView, upload, blob=f"sha256:{upload.sha256}" if upload.status == "complete" else None)


def model_view(model: Model) -> dict[str, Any]:
    return view_of(ModelView, model, **_registered(model))


def measured_view(evaluation: Job) -> dict[str, Any]:
    result = evaluation.result or {}
    figures = {name: result[name] for name in ("accuracy", "interval", "test_samples")}
    return view_of(MeasuredView, evaluation, **figures, dataset=evaluation.spec["dataset"], job=evaluation.id)


def dataset_view(dataset: Dataset) -> dict[str, Any]:
    sheet = dataset.thumbnails
    href = f"/v1/datasets/{dataset.id}/thumbnails"
    places = {"href": href, **{name: sheet[name] for name in ("side", "columns", "classes")}} if sheet else None
    return view_of(DatasetView, dataset, **_registered(dataset), thumbnails=places)


def _registered(entry: Entry) -> dict[str, Any]:
    """Return the fields that are not the entry's own. An error before the last attempt is none of the client's."""
    facts = entry.summary if entry.facts is None else entry.facts
    return {
        "blob": f"sha256:{entry.sha256}",
        "facts": facts,
        "error": entry.error if entry.state == "refused" else None,
    }


def key_view(key: Key) -> dict[str, Any]:
    return view_of(KeyView, key)


def worker_view(worker: Worker, lease_s: float) -> dict[str, Any]:
    return view_of(WorkerView, worker, alive=worker.consumes(lease_s))


def webhook_view(webhook: Webhook) -> dict[str, Any]:
    return view_of(WebhookView, webhook)


def delivery_view(delivery: Delivery) -> dict[str, Any]:
    return view_of(DeliveryView, delivery)


# Types of all that comes from outside: every text and every number of a parameter or a body is one of these.

Id = Annotated[str, Text(100)]
"""An id in an address. One that no row has is answered with 404."""
NameOrId = Annotated[str, Text(100)]
"""A registered name or an id in an address."""
Name = Annotated[str, Text(100, pattern=NAME, id_like=False)]
"""A new name, which is unique in its project and a part of addresses."""
Title = Annotated[str, Text(200)]
"""A name for people, of one line."""
Line = Annotated[str, Text(1000, min_length=0)]
"""Any other text, of one line; it may be empty."""
Filter = Annotated[str, Text(100, min_length=0)]
"""A value to select rows by."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number, offset or size. No column and no file holds more."""
BlobDigest = Annotated[str, Field(pattern=f"^{DIGEST.pattern}$")]
"""The digest of uploaded bytes: `sha256:` and 64 hexadecimal digits."""


# Models of request bodies, and of answers that contain classes of the engine.


class Schema(JsonObject):
    """Base of all models here."""


class Page(Schema, Generic[T]):
    """One page of a list. To get the next page, send `next` as `after`."""

    data: list[T]
    next: str | None = None


STATE = "`inspecting`: its file is being read. `refused`: it cannot be used; a new one may have its name."
FACTS = "What the inspection found; null if the state is not `ready`."


class ModelView(Schema):
    id: str
    name: str
    labels: dict[str, str]
    blob: str
    state: RegistrationState = Field(description=STATE)
    progress: InspectionProgress | None
    error: RefusalView | None = Field(description="Why it is refused.")
    facts: ProgramFacts | ModelFacts | None = Field(description=FACTS)
    warnings: list[WarningView]
    created_at: Time


class MeasuredModelView(ModelView):
    measured: list[MeasuredView] = Field(
        description="The newest accuracy on each data set on which it was evaluated, the newest first."
    )


class DatasetView(Schema):
    id: str | None = Field(description="Null for a built-in data set.")
    name: str
    labels: dict[str, str]
    blob: str | None
    state: RegistrationState = Field(description=STATE)
    progress: InspectionProgress | None = Field(description="How far the inspection is; null before it counts.")
    error: RefusalView | None = Field(description="Why it is refused.")
    facts: DatasetFacts | None = Field(description=FACTS)
    warnings: list[WarningView]
    thumbnails: ThumbnailsView | None = Field(description="Some of its images. Null for a built-in data set.")
    created_at: Time | None


class FactsSummary(Schema):
    """The facts of a model or data set in a list: those that do not name each class."""

    kind: str | None = None
    labelled: bool | None = None
    num_classes: int | None = None
    channels: int | None = None
    image_size: list[int | None] | None = Field(default=None, description="Height and width; null if any.")
    train: int | None = None
    test: int | None = None
    validation: int | None = None
    test_carved: bool | None = None
    architecture: str | None = None
    parameters: int | None = None
    bytes: int | None = None
    format: str | None = None
    batch: int | str | None = None
    outputs: str | None = None


LISTED_FACTS = "Null if the state is not `ready`. With `view=full` all facts."


class ListedModelView(ModelView):
    """A model in a list. `view=full` has all facts."""

    facts: FactsSummary | ProgramFacts | ModelFacts | None = Field(description=LISTED_FACTS)  # type: ignore[assignment]


class ListedDatasetView(DatasetView):
    """A data set in a list. `view=full` has all facts."""

    facts: FactsSummary | DatasetFacts | None = Field(description=LISTED_FACTS)  # type: ignore[assignment]


class Relabel(Schema):
    """New labels, in the place of all that there are."""

    labels: Labels


class Retry(Schema):
    """The place from which a retried job starts."""

    start: Literal["checkpoint", "scratch"] = Field(
        default="checkpoint",
        alias="from",
        description="`checkpoint`: at its newest checkpoint. `scratch`: its checkpoints and curves are deleted.",
    )


class NewProject(Schema):
    name: Annotated[str, Text(63, pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", id_like=False)] = Field(
        description="Small letters, digits and hyphens: it is the name of a folder, too."
    )


class NewKey(Schema):
    """An API key. A member needs no other role to run jobs."""

    name: Annotated[str, Text(100)] = Field(description="Whose it is, as it is shown on jobs: ann, or ci-nightly.")
    role: wire.Role = Field(default="member", description="At most the role of the key that makes it.")
    project: Annotated[str, Text(100)] | None = Field(
        default=None, description="Default: the project of the key that makes it. Only the operator names another."
    )
    expires_in_s: int | None = Field(
        default=None, ge=60, le=10 * 366 * 86_400, description="Seconds for which it can be used. Default: no end."
    )


STRICT = "True: a warning is an error, warning_refused, and nothing is registered."


class NewModel(Schema):
    """A teacher's checkpoint or program that has been uploaded."""

    name: Name
    blob: BlobDigest
    labels: Labels = Field(default={})
    architecture: Annotated[str, Text(200)] | None = Field(
        default=None,
        description="A name of GET /v1/architectures, or timm/<name>. Default: that of the file's metadata, else the "
        "one of the same names and shapes, with a warning.",
    )
    part: Part | None = Field(
        default=None,
        description="Which weights, if the file holds several networks: a name of the path to them, such as student.",
    )
    averaged: bool | None = Field(
        default=None,
        description="True: the averaged weights (EMA, SWA) of a file that has them beside raw ones; false: the raw "
        "ones. Default: the averaged, with a warning.",
    )
    preprocessing: Preprocessing | None = Field(default=None, description="Default: the file's own, if it has one.")
    class_names: ClassNames | None = Field(
        default=None,
        description="In the order of its outputs. Jobs compare them with the data's by name. Default: the file's own.",
    )
    image_size: int | None = Field(
        default=None,
        ge=4,
        le=1024,
        description="Height and width of the images that it learned from, which it gets as a teacher. Default: the "
        "file's.",
    )
    strict: bool = Field(default=False, description=STRICT)


class NewEvaluation(Schema):
    """The measurement of a registered model on the test images of a data set."""

    dataset: Annotated[str, Text(300)] = Field(
        description="A built-in name, a registered data set, or blob:sha256:<hex>."
    )
    image_size: int | None = Field(
        default=None, ge=4, le=1024, description="Height and width to which images of different sizes are resized."
    )
    preprocessing: Preprocessing | None = Field(
        default=None, description="Default: that of the registered model if it has one, else the data's mean and std."
    )
    class_map: ClassMap | None = Field(
        default=None,
        description="Which of the model's outputs answer each class of the data, where the classes differ: as a "
        "teacher's in the spec of a job.",
    )
    name: Title | None = Field(default=None, description="A name for the job.")
    labels: Labels = Field(default={})
    strict: bool = Field(default=False, description="True: a warning is an error, warning_refused.")
    scheduling: Scheduling = Field(default=Scheduling(), description="The scheduling of the job by the service.")


class NewExport(Schema):
    """Files of a job's student, from its best or its last epoch so far."""

    export: Formats = Field(default=("safetensors",), description="The files to write and to measure.")
    export_options: ExportOptions = Field(
        default=ExportOptions(), description="How they are made and measured: as in the spec of a job."
    )
    checkpoint: Which = Field(
        default="best",
        description="best: the weights of the best epoch on held-out images so far. last: those after the last step of "
        "the newest checkpoint.",
    )
    name: Title | None = Field(default=None, description="A name for the job.")
    labels: Labels = Field(default={})
    strict: bool = Field(
        default=False, description="True: a file that is refused fails the job, with the error warning_refused."
    )
    scheduling: Scheduling = Field(default=Scheduling(), description="The scheduling of the job by the service.")


class NewBenchmark(Schema):
    """The measurement of one network: a listed architecture, a registered model, or the student of a job."""

    architecture: Architecture | None = Field(
        default=None, description="A name of GET /v1/architectures, or one of timm's: its weights are drawn."
    )
    model: Annotated[str, Text(300)] | None = Field(default=None, description="A registered model, by name or id.")
    job: Id | None = Field(default=None, description="A job that has succeeded: its student.")
    num_classes: Annotated[int, Field(ge=2, le=100_000)] | None = Field(
        default=None, description="Of an architecture. Default: 10. A file has its own."
    )
    channels: Annotated[int, Field(ge=1, le=4)] | None = Field(
        default=None, description="Of an architecture. Default: 3. A file has its own."
    )
    image_size: Annotated[int, Field(ge=4, le=1024)] | None = Field(
        default=None, description="Height and width. Default: that of the images from which a file has learned."
    )
    batch_size: Annotated[int, Field(ge=2, le=1024)] = Field(
        default=32, description="The latency is measured with one image, and with so many."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Of the worker that takes the job; auto: a GPU if it has one."
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU threads. Default: those that are free, at most the slot's share of the cores."
    )
    export: Formats = Field(
        default=("safetensors",),
        description="safetensors: the network in PyTorch, on the device. Others: files, run by their own runtimes on "
        "the CPU.",
    )
    anew: bool = Field(default=False, description="True: measure again, also what is kept.")
    name: Title | None = Field(default=None, description="A name for the job.")
    labels: Labels = Field(default={})
    scheduling: Scheduling = Field(default=Scheduling(), description="The scheduling of the job by the service.")


class NewDataset(DataOptions):
    """A data set that has been uploaded: `.npz` arrays, or an archive with one folder per class. If it has no labels, a
    student can only be distilled onto it, together with a labelled data set.

    Jobs that name it read it with the options given here, unless they give their own."""

    name: Name
    blob: BlobDigest
    labels: Labels = Field(default={})
    strict: bool = Field(default=False, description=STRICT)


Events = Annotated[tuple[WebhookEvent, ...], Field(min_length=1, max_length=20), at_most(20)]
_URL = r"^https?://([A-Za-z0-9]{1,50}\.){0,3}[A-Za-z0-9]{1,50}(:[1-9][0-9]{0,3})?(/[A-Za-z0-9/._-]*)?$"
"""The usual form, for the document. `api.webhooks.checked_url` accepts others as well, and says what is wrong."""
WebhookUrl = Annotated[str, Text(2000), Field(json_schema_extra={"pattern": _URL})]


class NewWebhook(Schema):
    """An address to notify of the project's jobs. Each message is a POST, signed by Standard Webhooks."""

    url: WebhookUrl = Field(
        description="https://host/path. Addresses of private networks, and http, must be allowed by the operator.",
        examples=["https://example.org/hooks/distillery"],
    )
    events: Events = Field(
        default=("job.succeeded", "job.failed", "job.cancelled", "job.alert"),
        description="The events that it is notified of.",
    )
    enabled: bool = Field(default=True, strict=True, description="False: nothing is sent to it yet.")


class ChangedWebhook(Schema):
    """What is to be changed of a webhook. A field that is null or not given stays as it is."""

    url: WebhookUrl | None = None
    events: Events | None = None
    enabled: bool | None = Field(
        default=None,
        strict=True,
        description="False: what waits for it fails. True: it begins anew, also if the service has disabled it.",
    )
