"""What the service answers, as it comes over the wire: typed dictionaries, open to a newer server's fields.

Accuracies are fractions of 1, times ISO-8601 in UTC, sizes bytes.
"""

from typing import Any, Literal, NotRequired, TypedDict

from base.jobs import Status

STUDENT_FILE = "student.safetensors"


class Measured(TypedDict):
    """One model on the test images."""

    architecture: str
    parameters: int
    bytes: int
    accuracy: float
    accuracy_top5: float
    loss: float
    agreement: float | None
    """Share of the test images on which it says what the teacher says."""


class Report(TypedDict):
    """The proof: the teacher, its student, and the same student trained alone."""

    teacher: Measured | None
    """Several teachers are one here: their probabilities averaged."""
    student: Measured
    alone: Measured | None
    gain: float | None
    models: NotRequired[dict[str, Measured]]
    """All others: `teacher-1`, `assistant-1`, `generation-1`, `last`, `student-2`, `exit-1`, `ensemble`."""
    test_samples: int
    seconds: float


class Failure(TypedDict):
    """Why a job failed."""

    code: str
    message: str
    retryable: bool
    hint: str | None


class Progress(TypedDict, total=False):
    """How far a running job is; counted over the whole job, a trained baseline included."""

    trial: str
    """`student`, `alone`, `assistant-1`, `generation-1`; of a stage before the labels, `student/fsp`."""
    epoch: int
    epochs: int
    step: int
    total_steps: int
    percent: float
    seconds_remaining: float | None


class Waiting(TypedDict):
    """Why a queued job has not started; `until` where that has a time."""

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
    """One claim of a job, with the checkpoints that it went on from and left; `how` it ended is None while it runs."""

    attempt: int
    attempts_without_progress: int
    worker: str
    device: str | None
    started_at: str
    ended_at: str | None
    how: str | None
    first_step: int | None
    last_step: int | None


class Event(TypedDict):
    """Something that happened to a job; `seq` counts from 1 without gaps."""

    seq: int
    at: str
    type: str
    data: dict[str, Any]


class Fault(TypedDict, total=False):
    """One thing wrong with a request. `pointer` leads into the body; "" is all of it, "?name" a parameter."""

    pointer: str
    message: str
    code: str
    allowed: Any
    got: Any


class Validation(TypedDict):
    """What submitting a spec would say."""

    valid: bool
    errors: list[Fault]
    resolved_spec: dict[str, Any] | None
    estimate: dict[str, Any] | None


class Artifact(TypedDict):
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
    """A registered teacher; `facts` is what its inspection saw."""

    id: str
    name: str
    blob: str
    facts: dict[str, Any]
    created_at: str


class Dataset(TypedDict):
    """A data set; the built-in ones have no id and no blob."""

    id: str | None
    name: str
    blob: str | None
    facts: dict[str, Any]
    created_at: str | None


class Collection(TypedDict):
    """One run of the collector; `removed` by kind, `count` and `bytes`."""

    id: str
    host: str
    began_at: str
    ended_at: str | None
    removed: dict[str, dict[str, int]] | None
    error: str | None


class Storage(TypedDict):
    """What is kept, by kind `files` and `bytes`; the newest collection first."""

    usage: dict[str, dict[str, int]]
    free_bytes: int
    min_free_bytes: int
    collections: list[Collection]
