"""The job spec: the request body, the stored JSON, the engine's input and the checkpoint's metadata.

A plain string stands for an object with only that field: `"method": "kd"` is `{"name": "kd"}`.
`None` means that a field was not given; `resolve` replaces it once the data and the teacher are known.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from base.text import Text
from kdcore.spec.inputs import Dataset, Student, Teacher, Unlabelled
from kdcore.spec.methods import Method, SchemeOptions, scheme_of
from kdcore.spec.recipe import Training
from kdcore.spec.shipping import Documents, ExportOptions, Formats, Quantization
from kdcore.spec.vocabulary import Bounds, Vocabulary, at_most, named


def _single_or_several(given: Any) -> str:
    return "several" if isinstance(given, list | tuple) else "single"


Labels = Annotated[
    dict[
        Annotated[str, Text(63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")],
        Annotated[str, Text(200, min_length=0)],
    ],
    Field(max_length=16, description='Names and values to find it by, such as {"team": "vision"}.'),
    at_most(16),
]
Bound = Annotated[float, Field(ge=-1e9, le=1e9)]
AlertMetric = Literal[
    "validation/accuracy",
    "validation/loss",
    "train/accuracy",
    "train/loss",
    "train/label_loss",
    "train/distillation_loss",
]
OneStudent = Annotated[Student, named("architecture", Student)]
# The JSON type decides between one and several, so that a fault names only fields of that form.
OneOrSeveralTeachers = Annotated[
    Annotated[Teacher, Tag("single")]
    | Annotated[tuple[Teacher, ...], Field(min_length=1, max_length=16), at_most(16), Tag("several")],
    Discriminator(_single_or_several),
]
OneOrSeveralStudents = Annotated[
    Annotated[OneStudent, Tag("single")]
    | Annotated[tuple[OneStudent, ...], Field(min_length=1, max_length=8), at_most(8), Tag("several")],
    Discriminator(_single_or_several),
]
OneOrSeveralMethods = Annotated[
    Annotated[Method, Tag("single")]
    | Annotated[tuple[Method, ...], Field(min_length=1, max_length=8), at_most(8), Tag("several")],
    Discriminator(_single_or_several),
]


class Alert(Vocabulary):
    """A condition of which a job notifies once, also if several attempts meet it: by an event `alert` and by
    the project's webhooks (`job.alert`). Either a `metric` with a bound, or `no_progress_s`."""

    metric: AlertMetric | None = Field(default=None, description="A curve of the student: GET /v1/jobs/{id}/metrics.")
    below: Bound | None = Field(default=None, description="The alert is raised by a value of the metric below this.")
    above: Bound | None = Field(default=None, description="The alert is raised by a value of the metric above this.")
    from_epoch: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="The first epoch, counted from 1, whose values count. Default: 1."
    )
    no_progress_s: Annotated[float, Field(ge=1, le=366 * 86_400)] | None = Field(
        default=None,
        description="The alert is raised when the job has been running for so many seconds without a step, an "
        "evaluated or decoded image, or another phase. Waiting in the queue does not count.",
    )

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> Self:
        if (self.metric is None) == (self.no_progress_s is None):
            raise ValueError("give a metric with below or above, or no_progress_s")
        bounds = [name for name in ("below", "above") if getattr(self, name) is not None]
        if self.metric is not None and len(bounds) != 1:
            raise ValueError(f"give either below or above with the metric {self.metric}, a number to compare it with")
        unused = [*bounds, *(["from_epoch"] if self.from_epoch is not None else [])]
        if self.metric is None and unused:
            raise ValueError(f"only a metric has {' and '.join(unused)}")
        return self


class Scheduling(Vocabulary):
    """The scheduling of the job by the service. It does not change the training; `python -m kdcore` ignores it."""

    priority: int = Field(
        default=0,
        ge=-100,
        le=100,
        description="Jobs of the highest priority start first, then the oldest. Running jobs are not interrupted.",
    )
    deadline_s: Annotated[float, Field(gt=0, le=366 * 86_400)] | None = Field(
        default=None,
        description="Seconds after its acceptance, or last retry, within which the job must end, its waiting and "
        "pauses included; then it fails with deadline_exceeded. Default: none.",
    )
    max_attempts: Annotated[int, Field(ge=1, le=100)] | None = Field(
        default=None,
        description="Attempts in a row that may end without a new checkpoint before the job fails. Default: the "
        "server's.",
    )
    alerts: Annotated[tuple[Alert, ...], Field(max_length=16), at_most(16)] = Field(
        default=(),
        description="Conditions of which the job notifies while it runs, each once. An evaluation has no metrics.",
    )


TRAINED_BASELINES = ("train", "train_anew")
"""The values of `baseline` for a student alone that the job trains itself. A resolved spec has the first."""


class JobSpec(Vocabulary):
    """One distillation: loss = alpha · cross_entropy(student, labels) + beta · distillation(student, teacher).

    A loss on the student's logits divided by T is multiplied by T², so that alpha and beta keep their meaning when T
    changes. `ttm` divides the teacher's logits only: its loss has no T².
    """

    name: Annotated[str, Text(200)] | None = Field(
        default=None, description="A name for people, of one line; it need not be unique."
    )
    labels: Labels = Field(default={})
    dataset: Annotated[Dataset, named("source", Dataset)] = Field(
        description="The images to train on and to measure every model on. A plain string is their source."
    )
    unlabelled: Annotated[Unlabelled, named("source", Unlabelled)] | None = Field(
        default=None, description="More images to train on, which need no labels. A plain string is their source."
    )
    teacher: OneOrSeveralTeachers | None = Field(
        default=None,
        description="The trained network; some methods take none (GET /v1/methods). The probabilities of a list are "
        "averaged, by weight: only methods on logits can use a list.",
    )
    assistants: Annotated[tuple[OneStudent, ...], Field(max_length=8), at_most(8)] = Field(
        default=(),
        description="Networks between teacher and student, largest first: each is distilled from the one before "
        "(Mirzadeh et al., AAAI 2020, arXiv:1902.03393).",
    )
    student: OneOrSeveralStudents = Field(
        description="The network to train. A list for networks that teach each other (dml); the first is the result."
    )
    method: OneOrSeveralMethods = Field(
        description="A name, or an object with a name and the method's options. A list is a sum: each method's loss "
        "times its weight, and beta times the sum."
    )
    temperature: Annotated[float, Field(gt=0, le=1000), Bounds(ge=1e-3)] | None = Field(
        default=None,
        description="Divides both logits before the softmax. Default: the method's own (GET /v1/methods), in a list "
        "that of the first that has one.",
    )
    alpha: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None,
        description="Weight of the labels' loss. Default: the method's own (GET /v1/methods), in a list the first's.",
    )
    beta: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        default=None,
        description="Weight of the distillation loss. Default: the method's own (GET /v1/methods); 1 where methods "
        "have weights of their own, as in a list of several.",
    )
    training: Training = Field(default=Training(), description="The recipe of the training.")
    baseline: Annotated[str, Field(pattern=r"^(none|train|train_anew|(job|blob|file):.+)$"), Text(1000)] = Field(
        default="none",
        description="none, train (the same student, recipe and seed without the teacher; if an earlier job of the "
        "project has trained just that, its student is taken, with a warning), train_anew, or job:<id>: of an "
        "earlier job, a supervised one, or one that trained its own student alone, with the same network, data, recipe "
        "and seed; for `python -m kdcore` also file:<path> of its weights.",
    )
    seeds: int = Field(
        default=1,
        ge=1,
        le=32,
        description="Runs of the student, and of its baseline, with seeds training.seed, training.seed + 1, and so on: "
        "the report gives an interval over them. The first is delivered. Assistants are trained once.",
    )
    quantization: Quantization | None = Field(
        default=None, description="Training for int8; the student alone is trained in the same way."
    )
    export: Formats = Field(default=("safetensors",), description="The files of the student that the job delivers.")
    export_options: ExportOptions = Field(default=ExportOptions(), description="How these files are made and measured.")
    documents: Documents = Field(
        default=("html", "model_card"),
        description="What the job delivers beside report.json. html: the report as one page, report.html. model_card: "
        "model_card.zip, a folder for the Hugging Face Hub. tensorboard: tensorboard.zip, the curves as event files.",
    )
    strict: bool = Field(
        default=False,
        description="True: a warning that is known before the training is an error, warning_refused.",
    )
    scheduling: Scheduling = Field(default=Scheduling(), description="The scheduling of the job by the service.")

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.method if isinstance(self.method, tuple) else (self.method,)

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        if self.teacher is None:
            return ()
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)

    @property
    def students(self) -> tuple[Student, ...]:
        """The students; the first is the result of the job."""
        return self.student if isinstance(self.student, tuple) else (self.student,)

    @property
    def trains_baseline(self) -> bool:
        return self.baseline in TRAINED_BASELINES

    @property
    def method_name(self) -> str:
        """The names of all methods, as in `kd+attention`."""
        return "+".join(method.name for method in self.methods)

    @property
    def scheme(self) -> SchemeOptions:
        """The scheme: which model teaches which."""
        return scheme_of(self.methods)

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")
