"""The service's answers, described once for the API, which documents its routes with these types, and for the client.

A class or field docstring is the description in the OpenAPI document. Times are ISO 8601 in UTC, sizes are bytes,
accuracies are fractions of 1. A newer server may send more fields than are listed here.
"""

from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other TypedDict before Python 3.12

from base.errors import Code
from base.jobs import DeliveryStatus, Kind, Reason, SlotState, Status, WebhookEvent
from base.warning import Code as WarningCode

IS_TIME = "A record has seconds since 1970 here."
Time = Annotated[str, IS_TIME]


class AnyFields:
    """Marks a field that the OpenAPI document shows as an object with any fields, so that new fields can be added."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: Any) -> Any:
        return handler.generate_schema(dict[str, Any])


class View(TypedDict):
    """Base of all answers."""


# A setting of pydantic: a field that is not listed is an error (for the tests of answers).
View.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]


class WarningView(View):
    """Something that was guessed, left out or looks wrong. The list of codes is closed: `docs/warnings.md`."""

    code: WarningCode
    pointer: str
    """A place in the spec or registration (a JSON pointer), or empty if it concerns no field."""
    message: str
    hint: str | None


# A job


class ErrorView(View):
    """The error of a failed job. The list of codes is closed."""

    code: Code
    message: str
    retryable: bool
    hint: NotRequired[str | None]


class WaitingView(View):
    """The reason why a queued job has not started."""

    reason: Reason
    """`teacher`: a job whose student teaches it has not succeeded yet. `backing_off`: an attempt failed, another
    follows. `out_of_disk_space`: no worker has enough. `project_limit`: the project runs as many jobs as it may."""
    message: str
    until: Time | None
    """When the job is due again; null if that is not known."""
    jobs: list[str]
    """The jobs whose students it waits for, with the reason `teacher`."""


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


class BestEpoch(TypedDict):
    """The epoch that was the most accurate on held-out images."""

    epoch: int
    validation_accuracy: float


class LastEpoch(TypedDict):
    """The end of a training."""

    epoch: int
    accuracy: float
    """On the test images."""


class Measured(TypedDict):
    """The figures of one model on the test images."""

    architecture: str
    parameters: int
    bytes: int
    accuracy: float | None
    """Null for a teacher of other classes than the data's, as are the next two: no answer of it is right or wrong."""
    accuracy_top5: float | None
    loss: float | None
    agreement: float | None
    """Share of the test images on which the model and the teacher predict the same class."""
    accuracy_running_averages: NotRequired[float]
    """With the running averages of its batch norms in the place of measured statistics; only if they differ by more
    than noise (warning `batch_norm_not_converged`)."""
    temperature: NotRequired[float | None]
    """Divide the logits by it for calibrated probabilities (`calibration`). Of teacher, student and student alone."""
    best: NotRequired[BestEpoch]
    """The epoch whose weights are measured here and delivered. Of models that the job trained."""
    last: NotRequired[LastEpoch]
    training_accuracy: NotRequired[float]
    """Of a teacher that is a file of logits: its accuracy on training images."""


class Timings(TypedDict, total=False):
    """Seconds of a job by what was done in them, of all attempts together. An evaluation has some of them."""

    imports: float
    """Before the job's own `seconds`: almost none if the engine was started before its job."""
    data: float
    """Reading the data, which is decoded if no earlier job on this host has done so."""
    preparing: float
    """Reading the teacher and building the networks."""
    teacher_check: float
    caching: float
    """Looking up and keeping the teacher's outputs, within steps, too: reading and writing records, and cutting the
    views of later batches that fill up a piece; not the teacher's own passes, but those in which it is tried. With
    `overlap` only opening and closing, because the rest is done beside the student."""
    training: dict[str, float]
    """By trial, without `held_out` and `caching`."""
    held_out: float
    """Measuring models on held-out images after each epoch, of all trials."""
    evaluating: float
    """Measuring all models on the test images at the end."""
    exporting: float


class Interval(TypedDict):
    """A figure with its 95 % interval, in fractions of 1."""

    value: float
    low: float
    high: float


class NoGap(TypedDict):
    """Why a report states no gap closed."""

    code: Literal[
        "no_baseline", "no_teacher", "teacher_not_measured", "teacher_gap_holds_zero", "teacher_below_baseline"
    ]
    message: str


class OverImages(TypedDict):
    """How the intervals over test images were made: by a paired bootstrap."""

    test_samples: int
    resamples: int
    level: float
    """0.95."""


class SeedFigures(TypedDict):
    """One run of a job with several seeds; figures of its own test answers."""

    seed: int
    student: float
    alone: float | None
    gap_closed: float | None
    """Null where it may not be stated for this seed alone."""


class OverSeeds(TypedDict):
    """Means over the seeds of a job, with their 95 % intervals. Null is what no seed, or not each, has."""

    seeds: int
    student: Interval
    alone: Interval | None
    gain: Interval | None
    gap_closed: Interval | None
    """These four for other seeds on the same test images: Student's t."""
    gain_on_other_images: Interval | None
    gap_closed_on_other_images: Interval | None
    """For other seeds and other test images at once (analysis of variance); null below five seeds."""


class Proof(TypedDict):
    """Whether distilling helped, with the uncertainty of each figure. Over images, of the delivered student."""

    gap_closed: Interval | None
    """(student - alone) / (teacher - alone): 0 is no better than the student alone, 1 as good as the teacher."""
    no_gap: NoGap | None
    """Why `gap_closed` is null."""
    gain: Interval | None
    """student - alone; null without a baseline."""
    teacher_gap: Interval | None
    """teacher - alone."""
    images: OverImages
    seeds: list[SeedFigures]
    """Each run, the delivered one first."""
    over_seeds: OverSeeds | None
    """Null with one seed."""


class Fidelity(TypedDict):
    """How far a model answers as its teacher does, on the test images."""

    agreement: float
    """Share of the images on which both predict the same class."""
    kl: float
    """Mean of KL(teacher ‖ model) over the images, of the probabilities at temperature 1, in nats."""
    where_teacher_errs: float | None
    """The agreement on the images on which the teacher is wrong: how far its errors were learned. Null if there are
    none."""
    per_class: list[float | None]
    """The agreement on the images of each class; null for a class without test images."""


class FidelityView(TypedDict):
    """Student, and student alone, beside the teacher."""

    teacher_errs: int
    """The number of test images on which the teacher is wrong."""
    student: Fidelity
    alone: Fidelity | None


class ReliabilityBin(TypedDict):
    """The images whose largest probability is in one of the bins of equal width between 0 and 1."""

    images: int
    confidence: float | None
    """Mean of their largest probabilities; null without images."""
    accuracy: float | None


class Calibration(TypedDict):
    """Whether a model's largest probability is the share of images on which it is right (Guo et al., ICML 2017)."""

    ece: float
    """Expected calibration error: mean distance of confidence and accuracy over the bins, weighted by images."""
    reliability: list[ReliabilityBin]
    temperature: float | None
    """Divide the logits by it for calibrated probabilities. It has the smallest cross-entropy on held-out images;
    null if that has no minimum between 0.05 and 20, as of a model that is right on all of these images."""
    ece_after: float | None
    """The same on the test images, with the logits divided by the temperature."""
    reliability_after: list[ReliabilityBin] | None


class CalibrationView(TypedDict):
    """The calibration of all three models on the test images."""

    bins: int
    """Of equal width."""
    held_out: Literal["validation", "training"]
    """From where the held-out images are to which temperatures were fitted: the data's validation split, or a part of
    its training images that was left out of the training. A teacher, or a checkpoint that a student starts from, may
    have learned from the latter; then the temperature is too small."""
    held_out_images: int
    teacher: Calibration | None
    student: Calibration
    alone: Calibration | None


class ConfusedPair(TypedDict):
    """Test images of one class that are taken for another."""

    true: int
    predicted: int
    images: int


class Confusion(TypedDict):
    """What the student takes for what, on the test images. Classes are numbers, in the order of
    `dataset.class_names`."""

    matrix: list[list[int]] | None
    """Images by true class (rows) and predicted class (columns). Null above 50 classes."""
    largest: list[ConfusedPair]
    """The most frequent errors, at most 50."""


class ExampleView(TypedDict):
    """A test image on which the student is wrong."""

    image: int
    """Its row among the test images, from 0: `python -m kdcore images` writes them in this order."""
    predicted: int
    probability: float
    """The student's, of the class that it predicts."""
    teacher: int | None
    """What the teacher predicts."""


class WorstClass(TypedDict):
    """A class on which the student is least accurate, with images on which it is wrong with the most confidence."""

    number: int
    name: str
    accuracy: float
    examples: list[ExampleView]


class SimilarClasses(TypedDict):
    """Two classes that the teacher finds similar."""

    first: int
    second: int
    probability: float
    """Mean of what the teacher gives to the second on images of the first, and to the first on images of the second."""


class ClassesView(TypedDict):
    """The test images by class, in the order of `dataset.class_names`. Null is a class without test images."""

    test_samples: list[int]
    teacher: list[float | None] | None
    """Its accuracy on each class."""
    student: list[float | None]
    alone: list[float | None] | None
    worst: list[WorstClass]
    """At most 10, the least accurate first."""
    temperature: float | None
    """At which the teacher's probabilities were taken for `similar`: that of the job."""
    similar: list[SimilarClasses]
    """At most 20 pairs, the most similar first; empty without a teacher of these classes."""


BUSY = 0.8
"""With less of the CPU than that (`cpu_share`), latencies are said to be too long."""


class Latency(TypedDict):
    """The percentiles of the time of one run of a batch, over all runs."""

    batch: int
    p50_ms: float
    p95_ms: float
    cpu_share: NotRequired[float]
    """CPU seconds of the process by second of these runs, at most 1. Of files; far below 1, other programs had the CPU,
    and the times are too long."""


class Refused(TypedDict):
    """Why a file is not delivered: it is no artifact, and the job has a warning of this code."""

    code: str
    message: str
    hint: NotRequired[str | None]


class FileFigures(TypedDict):
    """A file of the student, loaded by its own runtime and measured after it was written. Null is what was not
    measured."""

    name: str
    """Of the artifact."""
    format: str
    bytes: int | None
    sha256: str | None
    runtime: str
    """The library that ran the file."""
    accuracy: float | None
    accuracy_without_overflow: NotRequired[float | None]
    """Of an int8 file that was measured on an x86 CPU without VNNI, where onnxruntime adds products of 8 bits in 16
    bits and sums overflow: its accuracy on CPUs that add them in 32 bits. By it the file is delivered or refused. Null
    where sums do not overflow. Absent in reports of earlier versions."""
    agreement: float | None
    """Share of the test images on which file and float student predict the same class."""
    images: int
    """Test images on which both were measured."""
    latency: list[Latency]
    batches_left_out: NotRequired[list[int]]
    """Batch sizes without a latency: so many images at a time need more memory than a measurement may take (4.3 GB and
    40 times the file). A smaller batch was measured in their place. Absent in reports of earlier versions."""
    threads: int | None
    """With which the latency was measured, on `cpu`."""
    cpu: str | None
    peak_memory_bytes: int | None
    """Of a process that loads the file and runs these batches, with its runtime."""
    quantization: Literal["after_training", "aware"] | None
    """How it became int8; null for float."""
    refused: Refused | None


class Int8Row(TypedDict):
    """A file of the student beside the others, float or int8."""

    student: Literal["delivered", "before"]
    """`before`: the same student at the best of the epochs before it trained for int8. Such a file is measured, and not
    delivered."""
    format: str
    quantization: Literal["after_training", "aware"] | None
    bytes: int | None
    accuracy: float | None
    accuracy_without_overflow: NotRequired[float | None]
    """As of `files`."""
    agreement: float | None
    images: int
    lost: float | None
    """What int8 has lost of the accuracy of the same weights in float, without what sums lose that overflow."""
    refused: Refused | None


class Int8Table(TypedDict):
    """What int8 costs the student, as its files show it."""

    aware_epochs: int
    """The last epochs, in which it trained for int8; 0 if it did not."""
    rows: list[Int8Row]


class KeptLogits(TypedDict):
    """Logits that are kept on the host for later jobs: of a teacher, or of another job's baseline, on test images, on
    held-out ones, and on those of the teacher check. Of the last attempt."""

    taken: int
    """How many times they were there already."""
    measured: int
    notes: list[str]
    """What could not be read, or is not kept, and why."""


class Report(TypedDict):
    """The result of a job: the teacher, its student, and the same student trained without the teacher. `docs/report.md`
    has every field."""

    version: NotRequired[int]
    """Of this schema: 2. A report without it is of version 1."""
    teacher: Measured | None
    """Several teachers are measured as one: their probabilities are averaged."""
    student: Measured
    alone: Measured | None
    gain: float | None
    """Accuracy of the student less that of the student alone; null without a baseline."""
    verdict: NotRequired[str]
    """What the job has shown, in one sentence: whether distilling helped, harmed, or made no measurable difference."""
    proof: NotRequired[Proof]
    models: NotRequired[dict[str, Measured]]
    """All other models: `teacher-1`, `assistant-1`, `generation-1`, `last`, `student-2`, `exit-1`, `ensemble`; of
    further seeds `student-seed-1` and `alone-seed-1`."""
    test_samples: int
    seconds: float
    """Of all attempts together."""
    cost: NotRequired[dict[str, Any]]
    """What was measured: seconds of a step by stage (`student/int8`: of epochs that train for int8), of an evaluated
    image and of the files; memory, device, precision."""
    teacher_cache: NotRequired[dict[str, Any] | None]
    """Of the last attempt: views of the teacher that were stored already (`hits`) or computed (`misses`); of these,
    those that were `stored` and `not_kept`; seconds of computing, bytes of the entry, and in `notes` why something was
    not kept. Null without a teacher."""
    kept_logits: NotRequired[KeptLogits]
    timings: NotRequired[Timings]
    computing: NotRequired[dict[str, Any]]
    """How the job computed: device, bf16, threads and why, the memory allocator, and what it was allowed to use where
    it fits: kernels, convolutions, folded, step, overlap. `used` says what ran, counted after the first step: by stage
    and lever (`folded` convolutions of the teacher, `kernels` of the students' batch norms, `convolutions` of our own,
    of both, `overlap`, `graph`, `teacher_cache`) an object with `used`, `places` (the layers that it computed; null
    where it is no matter of layers), `of` (how many there are) and `why` it was not used, or not everywhere. A stage
    that an earlier version trained has none."""
    warnings: list[WarningView]
    fidelity: NotRequired[FidelityView | None]
    """Null without the teacher's logits of the test images."""
    calibration: NotRequired[CalibrationView]
    confusion: NotRequired[Confusion]
    classes: NotRequired[ClassesView]
    files: NotRequired[list[FileFigures]]
    """The files of the student; also those that are not delivered, and why."""
    quantization: NotRequired[Int8Table | None]
    """Null without an int8 file."""
    dataset: NotRequired[dict[str, Any]]
    """The facts of the data set: classes, sizes, splits and digest."""
    starts: NotRequired[dict[str, Any]]
    """What students took from checkpoints, by their place in the spec; only if one did."""


class ClassFigures(TypedDict):
    """One class of a data set, in the order of its classes."""

    name: str
    accuracy: float | None
    """Null without test images."""
    test_samples: int


class Evaluation(TypedDict):
    """The result of a job of the kind `evaluation`: a registered model on all test images of a data set."""

    architecture: str
    parameters: int
    bytes: int
    accuracy: float
    interval: tuple[float, float]
    """95 % (Wilson) interval of the accuracy."""
    accuracy_top5: float
    loss: float
    test_samples: int
    per_class: list[ClassFigures]
    preprocessing: dict[str, list[float]]
    """Mean and std for each channel, of pixels in 0..1, by which the images were normalised."""
    dataset: dict[str, Any]
    seconds: float
    timings: NotRequired[Timings]
    warnings: list[WarningView]


class ExportedFrom(TypedDict):
    """Which weights of a job were exported."""

    which: Literal["best", "last"]
    step: int | None
    """Of the checkpoint; null if it is the file of a job that has succeeded."""
    epoch: int | None
    """The epoch after which the student had these weights; null if that is not known, or within the first one."""


class ExportedStudent(TypedDict):
    """The student itself on all test images, before any file was made of it."""

    architecture: str
    parameters: int
    bytes: int
    accuracy: float
    interval: tuple[float, float]
    """95 % (Wilson) interval of the accuracy."""
    accuracy_top5: float
    loss: float
    test_samples: int


class Export(TypedDict):
    """The result of a job of the kind `export`: files of the student of another job. `files` is as in a report."""

    job: str | None
    checkpoint: ExportedFrom
    measured: ExportedStudent
    files: list[dict[str, Any]]
    dataset: dict[str, Any]
    seconds: float
    timings: NotRequired[Timings]
    computing: NotRequired[dict[str, Any]]
    warnings: list[WarningView]


class MachineView(TypedDict):
    """What computed."""

    kind: Literal["cpu", "cuda"]
    name: str | None
    """The model of the CPU or GPU."""


class Benchmark(TypedDict):
    """The result of a job of the kind `benchmark`: the size and the speed of a network on this service's machine."""

    architecture: str
    """`program` for an ONNX model or an exported program."""
    parameters: int
    bytes: int
    """Of all tensors of a checkpoint."""
    macs: int | None
    """Multiply-accumulates of convolutions, linear layers and attention for one image. Null for an ONNX model."""
    num_classes: int
    channels: int
    image_size: tuple[int, int]
    """Height and width."""
    batch_size: int
    device: MachineView
    threads: int
    files: list[dict[str, Any]]
    """A row for each format, as in a report: `format`, `runtime`, `bytes`, `latency`, `threads`, `cpu`, `device`,
    `peak_memory_bytes`, `refused`. `safetensors` is the network as PyTorch runs it."""
    seconds: float
    warnings: list[WarningView]


class BenchmarkView(View):
    """What was asked for, and its figures as soon as they are measured. They are kept under `key`."""

    key: str
    """The SHA-256 of network, shape, batch sizes, device, threads, formats and PyTorch's version."""
    status: Status
    """Of the job that measures it, or did last."""
    job: str
    """Its id: GET /v1/jobs/{id}. It may be deleted; the figures are kept."""
    figures: Annotated[Benchmark, AnyFields] | None
    """The newest; null before the first job has succeeded."""
    error: ErrorView | None
    measured_at: Time | None


class SuggestionView(View):
    """A network that fits into the budget, in one format."""

    architecture: str
    format: str
    runtime: str
    device: MachineView
    threads: int | None
    bytes: int
    """Of the file; of `safetensors` in a benchmark, of the weights."""
    p50_ms: float | None
    p95_ms: float | None
    batch: int
    """Of the latency."""
    parameters: int
    macs: int | None
    accuracy: float | None
    """The best on test images that a job of this project has measured for this architecture and format; null if none
    has."""
    accuracy_job: str | None
    accuracy_of: Literal["file", "student"] | None
    """file: of this very file. student: of a student of this architecture, before a file was made of it."""
    measured_by: str
    """The id of the job that measured size and latency."""
    measured_at: Time


class UnmeasuredView(View):
    """A listed network of which nothing was measured at this shape."""

    architecture: str
    parameters: int | None
    body: dict[str, Any]
    """Send it to POST /v1/benchmarks."""


class Suggestions(View):
    """Students that fit into a budget, from measured figures alone, the best first."""

    ranked_by: Literal["accuracy", "parameters"]
    why: str
    """Why they are ranked so, in one sentence."""
    data: list[SuggestionView]
    measured: int
    """Networks and formats that were measured at this shape, whether they fit or not."""
    not_measured: list[UnmeasuredView]
    """The smallest ones first, at most 50."""
    not_measured_count: int


class TeacherCheck(TypedDict):
    """The teacher on a sample of the test images, before anything is trained."""

    accuracy: float
    interval: tuple[float, float]
    """95 % (Wilson) interval of the accuracy on all test images."""
    images: int
    """The images that were used, the same number of each class as far as possible."""
    test_samples: int
    """All test images."""
    dropped: NotRequired[float | None]
    """The mean probability that it gives to outputs which `class_map` leaves out; null without a map."""


class SenderView(View):
    """The key by which a job was sent."""

    key_id: str | None
    """Null for the operator's key of the settings, and where no key was needed (`key_name`: `local`)."""
    key_name: str
    """As it was then."""


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
    phase: str | None
    """The phase of a running job."""
    requested: Literal["cancel", "pause"] | None
    """The action that was requested of the running job and is not done yet."""
    allowed_actions: list[str]
    """The actions that are allowed now: some of cancel, pause, resume, retry, delete."""
    created_by: SenderView | None
    """Its sender. Null if it was sent to an earlier version."""
    kind: Kind
    """`distillation` trains a student, `evaluation` measures a registered model on test images, `export` writes files
    of a job's student, `benchmark` measures the speed of a network."""
    method: str
    """The names of its methods, as in kd+attention; the kind of a job that trains nothing."""
    labels: dict[str, str]
    """Those of the spec, or the ones that were set later."""
    progress: Annotated[Progress, AnyFields] | None
    queue_position: int | None
    """1 is next. Null unless the job is queued and due, and for one that is behind more than 1,000 others."""
    waiting: WaitingView | None
    """The reason why it has not started. Null unless it is queued."""
    priority: int
    """A job with a higher priority starts first."""
    not_before: Time | None
    """When a job that backs off is due again."""
    deadline_at: Time | None
    """It fails with deadline_exceeded if it has not ended by then."""
    attempts_without_progress: int
    """Attempts since the last new checkpoint; `/attempts` lists all."""
    max_attempts: int
    checkpoint_step: int | None
    """The newest step that it can resume from."""
    spec: dict[str, Any]
    resolved_spec: dict[str, Any]
    result: Annotated[Report, AnyFields] | None
    """The report: teacher, student, the student alone, and the gain. Of an evaluation: an `Evaluation`; of an export:
    an `Export`; of a benchmark: a `Benchmark`."""
    error: ErrorView | None
    teacher_check: Annotated[TeacherCheck, AnyFields] | None
    """The teacher's accuracy, measured before the training. Null before that, and without a teacher."""
    warnings: list[WarningView]
    """What was guessed, left out or looks wrong, in the order in which it was found."""
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    links: Links


class Figures(View):
    """The main figures of a job's result. Null is what was not measured."""

    accuracy: float | None
    """Of the student; of an evaluation, of the model; of an export, of the student that it took."""
    parameters: int | None
    bytes: int | None
    gain: float | None
    """student - alone, as the report's sentence states it: of several seeds the mean, unless the images leave open
    whether distilling helped; then that of the delivered seed, whose accuracies are here."""
    gap_closed: NotRequired[float | None]
    """(student - alone) / (teacher - alone), as the report's sentence states it, by the same rule as `gain`; null where
    it states none, absent for a job of an earlier version."""
    teacher_accuracy: float | None
    alone_accuracy: float | None
    """Of the student alone."""
    seconds: float | None


class JobSummary(View):
    """A job in a list: without its specs, its result and its warnings, which `view=full` adds."""

    id: str
    name: str | None
    status: Status
    phase: str | None
    requested: Literal["cancel", "pause"] | None
    allowed_actions: list[str]
    kind: Kind
    method: str
    labels: dict[str, str]
    dataset: str | None
    """As the spec names it."""
    teachers: list[str]
    """Their architectures, or the references to their files where these are not known; the first few."""
    assistants: list[str]
    students: list[str]
    model: str | None
    """What an evaluation or a benchmark measures, by the name that was sent."""
    created_by: SenderView | None
    progress: Annotated[Progress, AnyFields] | None
    queue_position: int | None
    waiting: WaitingView | None
    priority: int
    not_before: Time | None
    deadline_at: Time | None
    attempts_without_progress: int
    max_attempts: int
    checkpoint_step: int | None
    figures: Figures | None
    """Null before it has succeeded."""
    error: ErrorView | None
    warning_count: int
    created_at: Time
    started_at: Time | None
    finished_at: Time | None


class JobFilters(TypedDict, total=False):
    """The filters of a list of jobs, as a client sends them. `store.jobs.JobQuery` applies them: a job is listed if it
    matches all."""

    status: str | list[str] | None
    kind: str | None
    method: str | None
    name: str | None
    """The beginning of its name."""
    labels: list[str] | None
    """`name:value` each, or a `name` with any value."""
    dataset: str | None
    teacher: str | None
    student: str | None
    model: str | None
    job: str | None
    """Of exports and others: the job whose student they take."""
    sender: str | None
    created_after: str | None
    created_before: str | None
    sort: str | None


class AttemptView(View):
    """One attempt at a job: its worker, the steps that it began and ended with, and how it ended."""

    attempt: int
    """Counts from 1; `/logs?attempt=` takes this number."""
    attempts_without_progress: int
    """Counts from 1 again after each new checkpoint."""
    worker: str
    device: str | None
    started_at: Time
    ended_at: Time | None
    how: Literal["succeeded", "failed", "cancelled", "paused", "released", "lost"] | None
    """`released`: returned to the queue, not counted. `lost`: its lease expired. Null while it runs."""
    first_step: int | None
    """The checkpoint that it resumed from; null if it had none."""
    last_step: int | None
    """The newest checkpoint at its end."""


class EventView(View):
    seq: int
    """Counts from 1 within the job, without gaps."""
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


class AnswerView(TypedDict):
    """What a model says of an image."""

    architecture: str
    top: list[dict[str, Any]]
    """Up to five classes, the most probable one first: `class` (its name), `number`, `probability`."""


class PictureView(TypedDict):
    """An image that a job's models were asked about."""

    width: int
    height: int
    kinds: list[str]
    """What is special about it: `grey` or `colour`, `alpha` (transparent parts, seen over white), `palette`, `cmyk`,
    `sixteen_bit`, `oriented` (with a camera's tag), `animated` (its first frame was seen)."""
    shown: str
    """What the student was shown of it."""


class PredictionAnswer(TypedDict):
    """The answers of a job's models, side by side; null for a model that the job does not have."""

    teacher: AnswerView | None
    student: AnswerView
    alone: AnswerView | None
    """The same student, trained without the teacher."""
    agree: bool | None
    """True if teacher and student name the same class first."""
    image: PictureView
    notes: list[str]
    """What is to be known about the answer: why there is no teacher, or that it has other classes."""
    seconds: float


class PredictionView(View):
    """An image that a job's models are asked about."""

    id: str
    job: str
    state: Literal["waiting", "running", "answered", "failed"]
    message: str | None
    """Why there is no answer yet."""
    answer: Annotated[PredictionAnswer, AnyFields] | None
    error: ErrorView | None
    created_at: Time
    finished_at: Time | None


# The answer to a spec that is checked but not submitted


class FaultView(TypedDict, total=False):
    """One fault of a request. `pointer` is a JSON pointer into the body, or "?name" for a query parameter."""

    pointer: str
    message: str
    code: str
    allowed: Any
    got: Any


class Parameters(View):
    teacher: int | None
    """The sum over all teachers."""
    student: int | None
    """Of the first student, if several learn from each other."""
    trained: int | None
    """Of them those that are not frozen."""


class StartView(View):
    """What a student takes over from the checkpoint that it starts from."""

    checkpoint: str
    digest: str | None
    """Of its file; null for a file that is not here yet."""
    parameters: int
    taken: int
    """Parameters that start with the checkpoint's values."""
    fresh: list[str]
    """The first names of tensors that start from random weights."""
    fresh_tensors: int
    classifier: Literal["kept", "fresh"]
    """`kept`: the classes have the same names, or names are not known. It is brought into the data's order."""
    trained: int
    """Parameters that are not frozen."""


class PhaseSeconds(View):
    """Seconds by the phases of a job. Null means unknown, not zero."""

    preparing: float | None
    """Reading data and teacher. Null if it was not measured with this data set; the sum is then without it."""
    training: float | None
    """All optimizer steps, of every stage of every trial."""
    evaluating: float | None
    """The held-out images after each epoch, and the test images at the end."""
    exporting: float | None
    """Writing the student's files and measuring each; null until a job has exported such a student in these formats."""


class Estimate(View):
    """The numbers that are known before the job runs. Null means unknown, not zero."""

    steps: int | None
    """Optimizer steps of the whole job: of every stage, assistant, generation and trained baseline."""
    parameters: Parameters
    starts: dict[str, StartView]
    """By the pointer of a student or an assistant that starts from a checkpoint."""
    compression: float | None
    """The teacher's parameters divided by the student's."""
    seconds: float | None
    """Of the whole job: the sum of the phases that are known, without the time in the queue."""
    seconds_by_phase: PhaseSeconds
    memory_bytes: int | None
    """The largest memory of the engine (on a GPU, of the device). With the basis `parameters`: at least so much."""
    device: str | None
    """Where seconds and memory were measured: `cpu, 2 threads`, `cuda, NVIDIA H200`."""
    basis: Literal["measured", "probe", "parameters"] | None
    """`measured`: by earlier jobs of the project with the same networks. `probe`: a few steps on the server's machine.
    `parameters`: nothing was measured."""


class ValidationView(View):
    valid: bool
    errors: list[Annotated[FaultView, AnyFields]]
    warnings: list[WarningView]
    """What is guessed or looks wrong; with `strict` in the spec, these are errors."""
    resolved_spec: dict[str, Any] | None
    estimate: Estimate | None


class HealthView(View):
    """What a load balancer asks for."""

    status: Literal["ok", "ready"]


# Files. The API documents models and data sets with the engine's own classes of facts (`api/schemas.py`).


class UploadView(View):
    id: str
    filename: str | None
    offset: int
    bytes: int | None
    """The size of the whole file."""
    status: Literal["open", "complete"]
    blob: str | None
    """Names the bytes of a complete upload when a model or data set is registered."""


RegistrationState = Literal["inspecting", "ready", "refused"]


class InspectionProgress(View):
    """How far the inspection of a data set is. A new attempt, after the end of a server, begins at 0."""

    done: int
    """Images that were read."""
    total: int


class RefusalView(View):
    """Why a file that was registered cannot be used: what the answer to its POST would have said."""

    code: str
    """The code of the problem, such as `unusable` or `warning_refused`."""
    message: str
    hint: str | None
    errors: list[Annotated[FaultView, AnyFields]]


class ThumbnailsView(View):
    """Some training images of a data set, evenly over its classes, in one picture: squares in rows."""

    href: str
    side: int
    """Height and width of a square in pixels."""
    columns: int
    classes: list[int | None]
    """The class of each; null without labels."""


class Registered(TypedDict):
    """What registered models and data sets have."""

    name: str
    labels: dict[str, str]
    state: RegistrationState
    progress: InspectionProgress | None
    error: RefusalView | None
    """Why it is `refused`."""
    warnings: list[WarningView]


class Model(Registered):
    """A registered teacher; `facts` are the results of its inspection, None before its end."""

    id: str
    blob: str
    facts: dict[str, Any] | None
    created_at: Time


class MeasuredView(View):
    """The newest accuracy of a registered model on the test images of a data set."""

    dataset: str
    """By the name that was sent."""
    accuracy: float
    interval: tuple[float, float]
    """95 % (Wilson) interval of the accuracy."""
    test_samples: int
    job: str
    """The evaluation that measured it."""
    finished_at: Time | None


class MeasuredModel(Model):
    """A single model; lists have no measurements."""

    measured: list[MeasuredView]
    """For each data set on which it was evaluated the newest, newest first."""


class Dataset(Registered):
    """A data set. A built-in one has neither an id nor a blob."""

    id: str | None
    blob: str | None
    facts: dict[str, Any] | None
    thumbnails: ThumbnailsView | None
    created_at: Time | None


# Webhooks


class WebhookView(View):
    """An address that is notified of the project's jobs, by Standard Webhooks."""

    id: str
    url: str
    events: list[WebhookEvent]
    enabled: bool
    """Nothing is sent to one that is disabled, and what happens meanwhile is not sent later."""
    note: str | None
    """Why the service has disabled it; null if it has not."""
    failing_since: Time | None
    """The first failed try since the last that succeeded. After three days it is disabled."""
    created_at: Time


class SecretWebhookView(WebhookView):
    """A webhook with its secret, which is shown once."""

    secret: str | None
    """Every message is signed with it: give it to a library of standardwebhooks.com at the receiver. Null in the replay
    of a request under its `Idempotency-Key`: rotate the secret if the first answer was lost."""


class DeliveryView(View):
    """One message to one webhook. Its body is `type`, `timestamp` (`created_at`) and `data`."""

    id: str
    """The header `webhook-id` of the message, the same in every try and replay: a receiver drops what it has seen."""
    webhook_id: str
    type: str
    """An event of a webhook, or `webhook.test`."""
    data: dict[str, Any]
    status: DeliveryStatus
    """`pending`: it is, or will be, sent. `failed`: all tries have failed; a replay sends it again."""
    attempts: int
    """Tries since it was made or replayed."""
    next_at: Time | None
    """Of a pending one: when it is sent next."""
    attempted_at: Time | None
    """The last try."""
    answer_status: int | None
    """The HTTP status of the last answer; 2xx is success. Null without an answer."""
    answer: str | None
    """The beginning of the last answer's body."""
    error: str | None
    """Why the last try failed."""
    created_at: Time


# Who may call


Role = Literal["operator", "admin", "member", "reader"]


class KeyView(View):
    """An API key, without its secret."""

    id: str
    project: str
    """Whose rows it sees."""
    name: str
    role: Role
    """`reader`: reads. `member`: also makes and acts on jobs, models, data sets and uploads. `admin`: also the keys of
    the project. `operator`: also projects, and the keys of all."""
    prefix: str
    """The part after `dk_`, by which a key is found in a list."""
    created_at: Time
    created_by: str | None
    """The name of the key that made it."""
    expires_at: Time | None
    revoked_at: Time | None
    """Since when it cannot be used any more."""
    last_used_at: Time | None
    """To the minute."""


class NewKeyView(KeyView):
    key: str | None
    """The key itself: `dk_<prefix>_<secret>`. No other answer has it; null in a replay under an `Idempotency-Key`."""


class ProjectView(View):
    """A project. Its name stands in its keys."""

    name: str
    created_at: Time


# The server


class DeviceView(View):
    """One slot of a worker: a device that runs one job at a time."""

    name: str
    job: str | None
    state: SlotState
    """`out_of_disk_space`: too little to start a job. `stuck`: it neither polls for jobs nor runs one."""
    seen_s: float
    """Seconds from the slot's last activity to the worker's `seen_at`."""
    memory_bytes: int | None
    """Memory of the GPU, or of the host; slots of one device share it."""


class WorkerView(View):
    id: str
    host: str
    alive: bool
    """True if it sent a heartbeat within a lease, and not all of its slots are stuck."""
    devices: list[DeviceView]
    current_job: str | None
    started_at: Time
    seen_at: Time
    """Its last heartbeat."""


class LimitView(View):
    """One limit of a project."""

    value: int | None
    """Null: no limit of the project."""
    used: int | None
    """Null where nothing adds up: the size of an upload."""
    is_default: bool
    """False if the operator has set it for this project."""
    counts_in: Literal["project", "process", "upload"]
    """Where it counts: in the whole project, in the API process that answers, or in each upload."""


class AllLimits(View):
    jobs_queued: LimitView
    """Jobs that are queued or paused."""
    jobs_running: LimitView
    bytes_stored: LimitView
    """Bytes of uploads, registered files, artifacts and checkpoints, each content once. What jobs have made is counted
    again every 30 s."""
    upload_bytes: LimitView
    event_streams: LimitView
    inspections: LimitView
    """Models and data sets that are being inspected."""
    requests_per_s: LimitView
    """Requests with a key of the project; as many may come at once."""


class LimitsView(View):
    """The limits of a project, and what is used. A request beyond one is answered with 429, `limit_reached`, and
    `Retry-After`; where only deleting helps with 403, `quota_exceeded`; an upload that is too large with 413."""

    project: str
    limits: AllLimits


class AuditView(View):
    """Who did what to which resource, when and from where."""

    id: str
    at: Time
    project: str | None
    """Null for an unknown key."""
    key_id: str | None
    """Null for the operator's key of the settings, and without a key."""
    key_name: str | None
    role: str | None
    action: str
    """`<resource>.<verb>`, as in `job.submit`; `key.refused` for an unknown key, `request.refused` for a key without
    the right."""
    resource: str | None
    """The id or the name of what was acted on."""
    address: str | None
    request_id: str | None
    """The `X-Request-Id` of the answer, which the server's log has, too."""
    outcome: Literal["done", "refused"]
    details: dict[str, Any]


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
    ended_at: Time | None
    """Null while it runs, and if it was killed."""
    removed: dict[str, RemovedView] | None
    """By kind. What is moved to the trash (`to_trash`) is deleted by a later run."""
    error: str | None
    """The steps that failed. All other steps were done."""


class StorageView(View):
    project: dict[str, UsageView]
    """Of the key's project, by kind: models, datasets, uploads, open_uploads, artifacts, checkpoints. Bytes that
    several of them name are on the disk once."""
    usage: dict[str, UsageView]
    """Of all projects together, by kind: blobs, checkpoints, logs, uploads, trash, cache. For the operator only."""
    free_bytes: int
    """Free disk space for files."""
    min_free_bytes: int
    """With less free disk space, no job is started and no upload accepted."""
    collections: list[CollectionView]
    """The newest first. For the operator only."""
