"""Spell out every default, once all that a spec names is known. Resolving twice changes nothing."""

from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts
from kdcore.spec import weights
from kdcore.spec.fitting import teacher_network
from kdcore.spec.known import Known
from kdcore.spec.methods import Byot, Method, Ofd
from kdcore.spec.tapping import choose, margins, takes_taps
from kdcore.spec.vocabulary import (
    Augmentation,
    CropFlip,
    JobSpec,
    Multistep,
    NoAugmentation,
    Preprocessing,
    RandomResizedCrop,
    Schedule,
    Student,
    Teacher,
    Training,
)

EPOCHS_AS_PUBLISHED = {"warmup_epochs": (20, 240), "pretraining_epochs": (30, 240), "rampup_epochs": (80, 300)}
"""So many epochs, of so many: scaled to the epochs that a job asks for."""


def resolve(spec: JobSpec, known: Known) -> JobSpec:
    """The spec with nothing left to guess, but for what only a download will tell."""
    dataset = known.dataset
    assert dataset is not None, "a spec is resolved against data"
    methods = _methods(spec, known)
    temperature = spec.temperature if spec.temperature is not None else weights.temperature(spec.methods)
    return spec.model_copy(
        update={
            "method": methods if isinstance(spec.method, tuple) else methods[0],
            "temperature": temperature,
            "alpha": _given(spec.alpha, weights.alpha(spec.methods)),
            "beta": spec.beta if spec.beta is not None else weights.beta(spec.methods),
            "teacher": _teachers(spec, known),
            "assistants": tuple(_student(assistant, dataset) for assistant in spec.assistants),
            "student": _students(spec, dataset),
            "training": _training(spec.training, dataset),
        }
    )


def preprocessing(model: ModelFacts | None, dataset: DatasetFacts) -> Preprocessing:
    """The model's own normalisation where its file says one, else the data's mean and std."""
    if model is not None and model.mean and model.std:
        return Preprocessing(mean=tuple(model.mean), std=tuple(model.std))
    return Preprocessing(mean=tuple(dataset.mean), std=tuple(dataset.std))


def _methods(spec: JobSpec, known: Known) -> tuple[Method, ...]:
    fields = {name: getattr(spec, name) for name in ("teacher", "student")}
    student, teacher = known.network(spec.students[0].architecture), teacher_network(fields, known)
    in_epochs = (_in_epochs(method, spec.training.epochs) for method in weights.weigh(spec.methods))
    return tuple(_at_taps(method, student, teacher) for method in in_epochs)


def _in_epochs(method: Method, epochs: int) -> Method:
    """Stages and warm-ups in epochs of this job; a stage has one at least."""
    update = {}
    for name, (published, of) in EPOCHS_AS_PUBLISHED.items():
        if getattr(method, name, 0) is None and (name != "pretraining_epochs" or weights.is_staged(method)):
            update[name] = max(round(epochs * published / of), int(name == "pretraining_epochs"))
    return method.model_copy(update=update)


def _at_taps(method: Method, student: ArchitectureFacts | None, teacher: ArchitectureFacts | None) -> Method:
    if isinstance(method, Byot) and method.exits is None and student is not None:
        return method.model_copy(update={"exits": tuple(student.taps[:-1])})
    if not takes_taps(method) or method.pairs or student is None or teacher is None:
        return method
    pairs = choose(method, student, teacher)
    if not pairs:
        return method
    tapped = method.at(pairs)
    return tapped.model_copy(update={"margins": margins(pairs, teacher)}) if isinstance(method, Ofd) else tapped


def _teachers(spec: JobSpec, known: Known) -> Teacher | tuple[Teacher, ...] | None:
    if isinstance(spec.teacher, tuple):
        return tuple(_teacher(one, f"/teacher/{at}", known, len(spec.teacher)) for at, one in enumerate(spec.teacher))
    return spec.teacher and _teacher(spec.teacher, "/teacher", known, 1)


def _teacher(asked: Teacher, pointer: str, known: Known, of: int) -> Teacher:
    update: dict[str, object] = {"weight": _given(asked.weight, 1.0)} if of > 1 else {}
    facts = known.teachers.get(pointer)
    if facts is not None and known.dataset is not None:
        update["preprocessing"] = asked.preprocessing or preprocessing(facts, known.dataset)
        update["architecture"] = None if asked.program is not None else facts.architecture
    return asked.model_copy(update=update)


def _students(spec: JobSpec, dataset: DatasetFacts) -> Student | tuple[Student, ...]:
    if isinstance(spec.student, tuple):
        return tuple(_student(one, dataset) for one in spec.student)
    return _student(spec.student, dataset)


def _student(asked: Student, dataset: DatasetFacts) -> Student:
    return asked.model_copy(update={"preprocessing": asked.preprocessing or preprocessing(None, dataset)})


def _training(training: Training, dataset: DatasetFacts) -> Training:
    return training.model_copy(
        update={
            "schedule": _schedule(training.schedule, training.epochs),
            "augmentation": training.augmentation or _augmentation(dataset),
        }
    )


def _schedule(schedule: Schedule, epochs: int) -> Schedule:
    if not isinstance(schedule, Multistep) or schedule.milestones is not None:
        return schedule
    crd = (round(epochs * drop / 240) for drop in (150, 180, 210))
    return schedule.model_copy(update={"milestones": tuple(sorted({drop for drop in crd if 1 <= drop < epochs}))})


def _augmentation(dataset: DatasetFacts) -> Augmentation:
    """Small images: the field's crop and flip, its padding an eighth of the side. A mirrored digit is no digit."""
    side = min(dataset.image_size)
    if dataset.kind == "named" and dataset.channels == 1:
        return NoAugmentation()
    return CropFlip(padding=side // 8) if side <= 64 else RandomResizedCrop()


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
