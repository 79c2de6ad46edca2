"""The resolving of a spec's defaults, with the facts of its references. Resolving is idempotent."""

from collections.abc import Sequence
from math import ceil, isqrt, sqrt

from kdcore.catalog import DatasetFacts, ModelFacts, ProgramFacts
from kdcore.spec.fitting import Known, class_names, teacher_network, teacher_size
from kdcore.spec.job import (
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
from kdcore.spec.methods import Method
from kdcore.spec.rules import each_teacher

STORE_BYTES = 4 << 30
"""The most bytes of all training pictures in the size from which boxes are cut, if the spec does not say that size."""


def resolve(spec: JobSpec, known: Known) -> JobSpec:
    """Return the spec with every default written out, except those that depend on a file not downloaded yet."""
    dataset = known.dataset
    assert dataset is not None, "a spec is resolved after its data set is known"
    methods, teachers = _methods(spec, known), _teachers(spec, known)
    students = tuple(_student(student, dataset) for student in spec.students)
    return spec.model_copy(
        update={
            "dataset": spec.dataset.resolved(),
            "method": methods if isinstance(spec.method, tuple) else methods[0],
            "temperature": spec.temperature if spec.temperature is not None else _temperature(spec.methods),
            "alpha": _given(spec.alpha, spec.methods[0].defaults.alpha),
            "beta": spec.beta if spec.beta is not None else _beta(spec.methods),
            "teacher": teachers if isinstance(spec.teacher, tuple) else next(iter(teachers), None),
            "assistants": tuple(_student(assistant, dataset) for assistant in spec.assistants),
            "student": students if isinstance(spec.student, tuple) else students[0],
            "training": _training(spec.training, dataset, [one.image_size for one in teachers]),
        }
    )


def preprocessing(model: ModelFacts | None, dataset: DatasetFacts) -> Preprocessing:
    """Return the normalisation of the model's file if it has one, else the mean and std of the data."""
    if model is not None and model.mean and model.std:
        return Preprocessing(mean=tuple(model.mean), std=tuple(model.std))
    return Preprocessing(mean=tuple(dataset.mean), std=tuple(dataset.std))


def _temperature(methods: tuple[Method, ...]) -> float | None:
    """Return the default temperature of the first method that uses one."""
    return next((method.own_temperature for method in methods if method.own_temperature is not None), None)


def _beta(methods: tuple[Method, ...]) -> float | None:
    """Return the default beta: 1 if methods have their own weights, as in a list of several."""
    weighed = len(methods) > 1 or methods[0].weight is not None
    return 1.0 if weighed else methods[0].own_beta


def _methods(spec: JobSpec, known: Known) -> tuple[Method, ...]:
    student, teacher = known.network(spec.students[0].architecture), teacher_network(vars(spec), known)
    methods = (method.resolved(spec.training.epochs, student, teacher) for method in spec.methods)
    return tuple(method if len(spec.methods) == 1 else _weighed(method) for method in methods)


def _weighed(method: Method) -> Method:
    """Return a member of a list with its weight. A single method is weighed by beta instead."""
    return method if method.weight is not None else method.model_copy(update={"weight": method.own_beta})


def _teachers(spec: JobSpec, known: Known) -> tuple[Teacher, ...]:
    several = len(spec.teachers) > 1
    return tuple(_teacher(teacher, spec, known, pointer, several) for pointer, teacher in each_teacher(vars(spec)))


def _teacher(teacher: Teacher, spec: JobSpec, known: Known, pointer: str, several: bool) -> Teacher:
    update: dict[str, object] = {"weight": _given(teacher.weight, 1.0)} if several else {}
    facts = known.teachers.get(pointer)
    if facts is not None and known.dataset is not None:
        update["preprocessing"] = teacher.preprocessing or preprocessing(facts, known.dataset)
        names = class_names(teacher, facts)
        # Names in the data's own order change nothing, and those of 1,000 classes would hide the rest of the spec.
        update["class_names"] = tuple(names) if names and names != known.dataset.class_names else None
        is_program = teacher.program is not None or isinstance(facts, ProgramFacts)
        update["architecture"] = None if is_program else facts.architecture
        size = teacher_size(vars(spec), known, pointer, teacher)
        if facts.image_size == size and size[0] == size[1]:
            update["image_size"] = size[0]
    return teacher.model_copy(update=update)


def _student(student: Student, dataset: DatasetFacts) -> Student:
    return student.model_copy(update={"preprocessing": student.preprocessing or preprocessing(None, dataset)})


def _training(training: Training, dataset: DatasetFacts, teacher_sizes: Sequence[int | None]) -> Training:
    augmentation = training.augmentation or _augmentation(dataset)
    if isinstance(augmentation, RandomResizedCrop) and augmentation.store_size is None:
        store_size = _store_size(augmentation, dataset, [side for side in teacher_sizes if side is not None])
        augmentation = augmentation.model_copy(update={"store_size": store_size})
    return training.model_copy(
        update={"schedule": _schedule(training.schedule, training.epochs), "augmentation": augmentation}
    )


def _store_size(how: RandomResizedCrop, dataset: DatasetFacts, teacher_sizes: Sequence[int]) -> int | None:
    """Return the side of the pictures from which boxes are cut: the images' own if nothing larger is of use. None for
    images that are not resized, which are stored as they are."""
    side, width = dataset.image_size
    if side != width or (dataset.kind != "folders" and dataset.own_side is None):
        return None
    largest = max(side, *teacher_sizes, 0)
    enough = min(ceil(largest / sqrt(how.scale[0])), 2 * largest)
    affordable = isqrt(STORE_BYTES // (max(dataset.train, 1) * dataset.channels))
    store_size = min(enough, dataset.own_side or 0, affordable)
    return store_size if store_size > largest else side


def _schedule(schedule: Schedule, epochs: int) -> Schedule:
    if not isinstance(schedule, Multistep) or schedule.milestones is not None:
        return schedule
    crd = (round(epochs * drop / 240) for drop in (150, 180, 210))
    return schedule.model_copy(update={"milestones": tuple(sorted({drop for drop in crd if 1 <= drop < epochs}))})


def _augmentation(dataset: DatasetFacts) -> Augmentation:
    """Return the default augmentation. Grey images may be digits or letters: a mirrored one is another one, or none."""
    side = min(dataset.image_size)
    is_grey = dataset.grey or dataset.channels == 1
    if dataset.kind == "named" and is_grey:
        return NoAugmentation()
    return CropFlip(padding=side // 8, flip=not is_grey) if side <= 64 else RandomResizedCrop(flip=not is_grey)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
