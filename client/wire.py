"""The service's answers as typed dictionaries. A newer server may send more fields than are listed here.

Accuracies are fractions of 1, times are ISO 8601 in UTC, sizes are bytes.
"""

from typing import Any, Literal, NotRequired, TypedDict

from base.jobs import Status

STUDENT_FILE = "student.safetensors"


class Measured(TypedDict):
    """The figures of one model on the test images."""

    architecture: str
    parameters: int
    bytes: int
    accuracy: float
    accuracy_top5: float
    loss: float
    agreement: float | None
    """Share of the test images on which the model and the teacher predict the same class."""


class Report(TypedDict):
    """The result of a job: the teacher, its student, and the same student trained without the teacher."""

    teacher: Measured | None
    """Several teachers are measured as one: their probabilities are averaged."""
    student: Measured
    alone: Measured | None
    gain: float | None
    models: NotRequired[dict[str, Measured]]
    """All other models: `teacher-1`, `assistant-1`, `generation-1`, `last`, `student-2`, `exit-1`, `ensemble`."""
    test_samples: int
    seconds: float


class Failure(TypedDict):
    """The error with which a job failed."""

    code: str
    message: str
    retryable: bool
    hint: str | None


class Progress(TypedDict, total=False):
    """The progress of a running job, counted over all of its trials."""

    trial: str
    """`student`, `alone`, `assistant-1`, `generation-1`; a stage before the labels adds its name: `student/fsp`."""
    epoch: int
    epochs: int
    step: int
    total_steps: int
    percent: float
    seconds_remaining: float | None


class Waiting(TypedDict):
    """The reason why a queued job has not started; `until` is None if the end of the wait is not known."""

    reason: Literal["backing_off", "no_worker", "out_of_disk_space", "behind_others", "starting"]
    message: str
    until: str | None


class Job(TypedDict):
    id: str
    name: str | None
    status: Status
    phase: str | None
    requested: str | None
    allowed_actions: list[str]
    method: str
    progress: Progress | None
    queue_position: int | None
    waiting: Waiting | None
    priority: int
    not_before: str | None
    deadline_at: str | None
    attempts_without_progress: int
    max_attempts: int
    checkpoint_step: int | None
    spec: dict[str, Any]
    resolved_spec: dict[str, Any]
    result: Report | None
    error: Failure | None
    created_at: str
    started_at: str | None
    finished_at: str | None


class Attempt(TypedDict):
    """One run of a job by one worker. `first_step` and `last_step` are those of its first and last checkpoint."""

    attempt: int
    """Counts from 1; `/logs?attempt=` takes this number."""
    attempts_without_progress: int
    worker: str
    device: str | None
    started_at: str
    ended_at: str | None
    how: str | None
    """How the attempt ended; None while it runs."""
    first_step: int | None
    last_step: int | None


class Event(TypedDict):
    """One event of a job; `seq` counts from 1 without gaps."""

    seq: int
    at: str
    type: str
    data: dict[str, Any]


class Fault(TypedDict, total=False):
    """One fault of a request. `pointer` is a JSON pointer into the body, or "?name" for a query parameter."""

    pointer: str
    message: str
    code: str
    allowed: Any
    got: Any


class Validation(TypedDict):
    """The answer to a spec that is only checked, not submitted."""

    valid: bool
    errors: list[Fault]
    resolved_spec: dict[str, Any] | None
    estimate: dict[str, Any] | None


class Artifact(TypedDict):
    """A file that a job made."""

    name: str
    bytes: int
    sha256: str
    media_type: str
    href: str


class Upload(TypedDict):
    id: str
    filename: str | None
    offset: int
    bytes: int | None
    status: Literal["open", "complete"]
    blob: str | None


class Model(TypedDict):
    """A registered teacher; `facts` are the results of its inspection."""

    id: str
    name: str
    blob: str
    facts: dict[str, Any]
    created_at: str


class Dataset(TypedDict):
    """A data set. A built-in one has neither an id nor a blob."""

    id: str | None
    name: str
    blob: str | None
    facts: dict[str, Any]
    created_at: str | None


class Collection(TypedDict):
    """One run of the collector; `removed` holds `count` and `bytes` for each kind."""

    id: str
    host: str
    began_at: str
    ended_at: str | None
    removed: dict[str, dict[str, int]] | None
    error: str | None


class Storage(TypedDict):
    """Disk usage (`files` and `bytes` for each kind) and the runs of the collector, newest first."""

    usage: dict[str, dict[str, int]]
    free_bytes: int
    min_free_bytes: int
    collections: list[Collection]
