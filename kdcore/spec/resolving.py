"""Spell out every default, once all that a spec names is known. Resolving twice changes nothing."""

from kdcore.catalog import DatasetFacts, ModelFacts
from kdcore.spec.fitting import Known, teacher_network
from kdcore.spec.job import (
    Augmentation,
    CropFlip,
    JobSpec,
    Multistep,
    NoAugmentation,
    Preprocessing,
    RandomResizedCrop,
    Recipe,
    Schedule,
    Student,
    Teacher,
)
from kdcore.spec.methods import Method


def resolve(spec: JobSpec, known: Known) -> JobSpec:
    """The spec with nothing left to guess, but for what only a download will tell."""
    dataset = known.dataset
    assert dataset is not None, "a spec is resolved against data"
    methods = _methods(spec, known)
    return spec.model_copy(
        update={
            "method": methods if isinstance(spec.method, tuple) else methods[0],
            "temperature": spec.temperature if spec.temperature is not None else _temperature(spec.methods),
            "alpha": _given(spec.alpha, spec.methods[0].defaults.alpha),
            "beta": spec.beta if spec.beta is not None else _beta(spec.methods),
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


def _temperature(methods: tuple[Method, ...]) -> float | None:
    """The default of the first method that uses one."""
    return next((method.own_temperature for method in methods if method.own_temperature is not None), None)


def _beta(methods: tuple[Method, ...]) -> float | None:
    """1 where methods have weights of their own, as in a list of several."""
    weighed = len(methods) > 1 or methods[0].weight is not None
    return 1.0 if weighed else methods[0].own_beta


def _methods(spec: JobSpec, known: Known) -> tuple[Method, ...]:
    fields = {name: getattr(spec, name) for name in ("teacher", "student")}
    student, teacher = known.network(spec.students[0].architecture), teacher_network(fields, known)
    methods = (method.resolved(spec.training.epochs, student, teacher) for method in spec.methods)
    return tuple(method if len(spec.methods) == 1 else _weighed(method) for method in methods)


def _weighed(method: Method) -> Method:
    """A member of a list with its weight. A method that stands alone is weighed by beta."""
    return method if method.weight is not None else method.model_copy(update={"weight": method.own_beta})


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


def _training(training: Recipe, dataset: DatasetFacts) -> Recipe:
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
