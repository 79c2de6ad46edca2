"""What the fields of a spec say about each other, about the data and about the teacher.

Each rule looks only at fields that could be read, so that one bad field hides no other fault.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdcore.catalog import METHODS, ArchitectureFacts, DatasetFacts, ModelFacts
from kdcore.errors import Fault
from kdcore.spec.methods import Kd, Method
from kdcore.spec.vocabulary import Dataset, Multistep, Preprocessing, Student, Teacher, Training

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Named:
    """Something that a spec refers to by name: where it stands, what kind of thing it is, and the name."""

    pointer: str
    kind: Literal["dataset", "teacher", "baseline"]
    text: str


def references(fields: Fields) -> list[Named]:
    """What must be looked up before the spec can be accepted."""
    found = []
    dataset, teacher, baseline = fields.get("dataset"), fields.get("teacher"), fields.get("baseline")
    if isinstance(dataset, Dataset):
        found.append(Named("/dataset", "dataset", dataset.source))
    if isinstance(teacher, Teacher):
        found.append(Named("/teacher/checkpoint", "teacher", teacher.checkpoint))
    if isinstance(baseline, str) and baseline.startswith("job:"):
        found.append(Named("/baseline", "baseline", baseline))
    return found


def rules(fields: Fields) -> list[Fault]:
    """Every contradiction between the fields that could be read."""
    return [fault for rule in _RULES for fault in rule(fields)]


def fit(
    fields: Fields,
    dataset: DatasetFacts | None,
    teacher: ModelFacts | None,
    student: ArchitectureFacts | None,
) -> list[Fault]:
    """What of teacher and student does not fit the data; None stands for what could not be looked up."""
    if dataset is None:
        return []
    faults = [
        *_channels(dataset, fields.get("teacher"), "/teacher"),
        *_channels(dataset, fields.get("student"), "/student"),
    ]
    if teacher is not None:
        faults += _teacher_fit(dataset, teacher, fields)
    if student is not None:
        faults += _architecture_fit(dataset, student, "/student/architecture")
    training = fields.get("training")
    if isinstance(training, Training):
        faults += _enough_images(dataset, training)
    return faults


def _teacher_is_needed(fields: Fields) -> Iterator[Fault]:
    method = _method(fields)
    if method is None or "teacher" not in fields:
        return
    needed = METHODS[method.name].needs_teacher
    if needed and fields["teacher"] is None:
        yield Fault("/teacher", f"the method {method.name!r} needs a teacher", "missing", "an object with a checkpoint")
    if not needed and fields["teacher"] is not None:
        yield Fault("/teacher", f"the method {method.name!r} has no use for a teacher", "unused", "leave it out")


def _temperature_is_used(fields: Fields) -> Iterator[Fault]:
    method, temperature = _method(fields), fields.get("temperature")
    if method is None or temperature is None:
        return
    if not METHODS[method.name].uses_temperature:
        yield Fault(
            "/temperature", f"the method {method.name!r} has no temperature", "unused", "leave it out", temperature
        )
    elif isinstance(method, Kd) and method.form == "logits_l2":
        yield Fault("/temperature", "the form 'logits_l2' has no temperature", "unused", "leave it out", temperature)


def _weights_mean_something(fields: Fields) -> Iterator[Fault]:
    method, alpha, beta = _method(fields), fields.get("alpha"), fields.get("beta")
    if method is None:
        return
    if not METHODS[method.name].needs_teacher:
        if beta is not None:
            yield Fault("/beta", f"the method {method.name!r} has no distillation loss", "unused", "leave it out", beta)
        if alpha == 0:
            yield Fault("/alpha", "with alpha 0 there is nothing to learn from", "not_allowed", "> 0", alpha)
    elif alpha == 0 and beta == 0:
        yield Fault("/beta", "with alpha and beta both 0 there is nothing to learn from", "not_allowed", "> 0", beta)


def _baseline_means_something(fields: Fields) -> Iterator[Fault]:
    method, baseline = _method(fields), fields.get("baseline")
    if method is not None and baseline not in (None, "none") and not METHODS[method.name].needs_teacher:
        yield Fault("/baseline", "without a teacher the student is its own baseline", "unused", ["none"], baseline)


def _teacher_says_its_architecture(fields: Fields) -> Iterator[Fault]:
    teacher = fields.get("teacher")
    if isinstance(teacher, Teacher) and teacher.architecture is None and teacher.checkpoint.startswith("blob:"):
        yield Fault("/teacher/architecture", "a bare file does not say which network it belongs to", "missing")


def _schedule_fits_epochs(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    if not isinstance(training, Training):
        return
    schedule = training.schedule
    if schedule.warmup_epochs >= training.epochs:
        yield Fault(
            "/training/schedule/warmup_epochs", "the warm-up must end before the training", "not_allowed",
            f"< {training.epochs}", schedule.warmup_epochs,
        )  # fmt: skip
    if isinstance(schedule, Multistep) and schedule.milestones:
        rising = all(a < b for a, b in zip(schedule.milestones, schedule.milestones[1:], strict=False))
        if not rising or schedule.milestones[-1] >= training.epochs:
            yield Fault(
                "/training/schedule/milestones", "milestones must rise and lie before the last epoch", "not_allowed",
                f"< {training.epochs}", list(schedule.milestones),
            )  # fmt: skip


def _crop_ranges_rise(fields: Fields) -> Iterator[Fault]:
    training = fields.get("training")
    augmentation = training.augmentation if isinstance(training, Training) else None
    for name in ("scale", "ratio"):
        low, high = getattr(augmentation, name, (0, 0))
        if low > high:
            pointer = f"/training/augmentation/{name}"
            yield Fault(pointer, "the smaller number comes first", "not_allowed", [high, low], [low, high])


_RULES: tuple[Callable[[Fields], Iterator[Fault]], ...] = (
    _teacher_is_needed,
    _temperature_is_used,
    _weights_mean_something,
    _baseline_means_something,
    _teacher_says_its_architecture,
    _schedule_fits_epochs,
    _crop_ranges_rise,
)


def _teacher_fit(dataset: DatasetFacts, teacher: ModelFacts, fields: Fields) -> Iterator[Fault]:
    asked = fields.get("teacher")
    named = asked.architecture if isinstance(asked, Teacher) else None
    if named is not None and named != teacher.architecture:
        yield _mismatch(
            "/teacher/architecture", f"the checkpoint is a {teacher.architecture}", teacher.architecture, named
        )
    if teacher.num_classes != dataset.num_classes:
        text = f"the teacher tells {teacher.num_classes} classes apart, the data set has {dataset.num_classes}"
        yield _mismatch("/teacher/checkpoint", text, dataset.num_classes, teacher.num_classes)
    elif teacher.class_names and teacher.class_names != dataset.class_names:
        text = "the teacher's classes are named or ordered otherwise than the data set's"
        yield _mismatch("/teacher/checkpoint", text, dataset.class_names[:10], teacher.class_names[:10])
    if teacher.channels != dataset.channels:
        text = f"the teacher takes images of {teacher.channels} channels, the data set has {dataset.channels}"
        yield _mismatch("/teacher/checkpoint", text, dataset.channels, teacher.channels)


def _architecture_fit(dataset: DatasetFacts, facts: ArchitectureFacts, pointer: str) -> Iterator[Fault]:
    if facts.channels not in ("any", dataset.channels):
        text = f"{facts.name} takes images of {facts.channels} channels, the data set has {dataset.channels}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)
    if min(dataset.image_size) < facts.min_image:
        height, width = dataset.image_size
        text = f"{facts.name} needs images of at least {facts.min_image} pixels, the data set has {height} x {width}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)
    if facts.max_image is not None and max(dataset.image_size) > facts.max_image:
        height, width = dataset.image_size
        text = f"{facts.name} takes images of {facts.max_image} pixels at most, the data set has {height} x {width}"
        yield Fault(pointer, text, "not_allowed", None, facts.name)


def _channels(dataset: DatasetFacts, model: Teacher | Student | None, pointer: str) -> Iterator[Fault]:
    preprocessing: Preprocessing | None = model.preprocessing if model is not None else None
    if preprocessing is None:
        return
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != dataset.channels:
            text = f"one number for each of the data set's {dataset.channels} channels"
            yield Fault(f"{pointer}/preprocessing/{name}", text, "not_allowed", dataset.channels, len(values))


def _enough_images(dataset: DatasetFacts, training: Training) -> Iterator[Fault]:
    left = dataset.train - round(dataset.train * training.validation_fraction)
    if training.batch_size > left:
        text = f"{left} training images are left after validation, fewer than one batch"
        yield Fault("/training/batch_size", text, "not_allowed", f"≤ {left}", training.batch_size)


def _mismatch(pointer: str, message: str, allowed: Any, got: Any) -> Fault:
    return Fault(pointer, message, "teacher_mismatch", allowed, got)


def _method(fields: Fields) -> Method | None:
    return fields.get("method")
