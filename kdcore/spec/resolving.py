"""The resolving of a spec's defaults, with the facts of its references. Resolving is idempotent."""

from collections.abc import Sequence
from math import ceil, isqrt, sqrt

from kdcore.catalog import DatasetFacts, LogitsFacts, ModelFacts, ProgramFacts, StartFacts
from kdcore.spec.classes import as_numbers, class_names, class_outputs
from kdcore.spec.fitting import Known, default_augmentation, images_per_class, teacher_network, teacher_size
from kdcore.spec.inputs import Preprocessing, Student, Teacher
from kdcore.spec.job import JobSpec
from kdcore.spec.methods import Method
from kdcore.spec.methods.options import Weights
from kdcore.spec.plan import aware_epochs
from kdcore.spec.recipe import AdamW, Cosine, CropFlip, Multistep, Optimizer, RandomResizedCrop, Schedule, Sgd, Training
from kdcore.spec.rules import each_assistant, each_student, each_teacher
from kdcore.spec.shipping import Quantization

FINE_TUNING: dict[type[Sgd | AdamW], dict[str, float]] = {
    Sgd: {"lr": 0.01, "weight_decay": 1e-4},
    AdamW: {"lr": 1e-4},
}
"""Defaults of the optimizers for students that start from a checkpoint. SGD's are the usual ones of fine-tuning, with
momentum 0.9 (Li et al., "Rethinking the Hyperparameters for Fine-tuning", ICLR 2020, arXiv:2002.11770, section 1);
AdamW's rate is a tenth of PyTorch's."""
WARM_UP = 0.1
"""Part of the epochs in which the rate of a fine-tuning rises, one epoch at most: a large step at the start would undo
what the weights have learned."""

STORE_BYTES = 4 << 30
"""The most bytes of all training pictures in the size from which boxes are cut, if the spec does not say that size."""


def resolve(spec: JobSpec, known: Known) -> JobSpec:
    """Return the spec with every default written out, except those that depend on a file not downloaded yet."""
    dataset = known.dataset
    assert dataset is not None, "a spec is resolved after its data set is known"
    methods, teachers = _methods(spec, known), _teachers(spec, known)
    weights = weights_of(spec, known)
    students = tuple(_student(student, dataset, known.starts.get(at)) for at, student in each_student(vars(spec)))
    return spec.model_copy(
        update={
            "dataset": spec.dataset.resolved(),
            "baseline": "train" if spec.trains_baseline else spec.baseline,
            "method": methods if isinstance(spec.method, tuple) else methods[0],
            "temperature": weights.temperature,
            "alpha": weights.alpha,
            "beta": weights.beta,
            "teacher": teachers if isinstance(spec.teacher, tuple) else next(iter(teachers), None),
            "assistants": tuple(_student(one, dataset, known.starts.get(at)) for at, one in each_assistant(vars(spec))),
            "student": students if isinstance(spec.student, tuple) else students[0],
            "training": _training(
                spec.training,
                dataset,
                [one.image_size for one in teachers],
                all(one.checkpoint for one in spec.students),
            ),
            "quantization": _quantization(spec),
        }
    )


def preprocessing(model: ModelFacts | StartFacts | None, dataset: DatasetFacts) -> Preprocessing:
    """Return the normalisation of the model's file if it has one, else the mean and std of the data."""
    if model is not None and model.mean and model.std:
        return Preprocessing(mean=tuple(model.mean), std=tuple(model.std))
    return Preprocessing(mean=tuple(dataset.mean), std=tuple(dataset.std))


def loaded_as(model: ModelFacts | StartFacts) -> dict[str, object]:
    """Return the fields that choose the same weights of a model's file again; none if it has only these."""
    loading = model.loading
    if loading is None or (loading.part is None and loading.averaged is None):
        return {}
    return {"part": loading.part, "averaged": loading.averaged}


def named_classes(teacher: Teacher, facts: ModelFacts, dataset: DatasetFacts) -> dict[str, object]:
    """Return the fields that say which outputs of a model answer which class: numbers if there is a map, else names.

    Names in the data's own order change nothing, and those of 1,000 classes would hide the rest of the spec. Until the
    names of the data's classes are known, a map stays as it is.
    """
    names, mapped = class_names(teacher, facts), class_outputs(teacher, facts, dataset)
    if mapped is not None and dataset.class_names:
        return {"class_names": None, "class_map": as_numbers(mapped.outputs, dataset)}
    return {"class_names": tuple(names) if names and names != dataset.class_names else None}


def weights_of(spec: JobSpec, known: Known) -> Weights:
    """Return the numbers of the job's loss: those of the spec, else the defaults."""
    default = _short_weights(spec, known)
    if default is None:
        default = Weights(spec.methods[0].defaults.alpha, _beta(spec.methods), _temperature(spec.methods))
    return Weights(
        alpha=_given(spec.alpha, default.alpha),
        beta=spec.beta if spec.beta is not None else default.beta,
        temperature=spec.temperature if spec.temperature is not None else default.temperature,
    )


def _short_weights(spec: JobSpec, known: Known) -> Weights | None:
    """Return the weights of a method in a short training, if the spec gives none, and as far as they were measured:
    one method, labelled images, students that start from nothing."""
    given = (spec.temperature, spec.alpha, spec.beta) != (None, None, None)
    if given or len(spec.methods) > 1 or spec.unlabelled is not None or any(one.checkpoint for one in spec.students):
        return None
    method, seen = spec.methods[0], images_per_class(spec, known)
    is_short = seen is not None and method.short_budget is not None and seen <= method.short_budget.images_per_class
    return method.short_weights if is_short else None


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
    if facts is not None and known.dataset is not None and not isinstance(facts, LogitsFacts):
        update["preprocessing"] = teacher.preprocessing or preprocessing(facts, known.dataset)
        update |= named_classes(teacher, facts, known.dataset)
        is_program = teacher.program is not None or isinstance(facts, ProgramFacts)
        update["architecture"] = None if is_program else facts.architecture
        size = teacher_size(vars(spec), known, pointer, teacher)
        if facts.image_size == size and size[0] == size[1]:
            update["image_size"] = size[0]
        update |= loaded_as(facts)
    return teacher.model_copy(update=update)


def _student(student: Student, dataset: DatasetFacts, start: StartFacts | None) -> Student:
    update: dict[str, object] = {"preprocessing": student.preprocessing or preprocessing(start, dataset)}
    if student.checkpoint is not None:
        update["head_lr"] = _given(student.head_lr, 1.0)
    if start is not None:
        names = student.class_names or tuple(start.class_names or ())
        # Other names matter only where their number is the data's: else the classifier is fresh anyway.
        compared = len(names) == dataset.num_classes and list(names) != dataset.class_names
        update["class_names"] = names if compared else None
        update |= loaded_as(start)
    return student.model_copy(update=update)


def _training(
    training: Training, dataset: DatasetFacts, teacher_sizes: Sequence[int | None], fine_tuning: bool
) -> Training:
    optimizer, schedule = training.optimizer, training.schedule
    if fine_tuning:
        optimizer = _fine_tuning(optimizer)
        if "schedule" not in training.model_fields_set:
            schedule = Cosine(warmup_epochs=round(min(1.0, WARM_UP * training.epochs), 3))
    augmentation = training.augmentation or default_augmentation(dataset)
    if isinstance(augmentation, RandomResizedCrop) and augmentation.store_size is None:
        store_size = _store_size(augmentation, dataset, [side for side in teacher_sizes if side is not None])
        augmentation = augmentation.model_copy(update={"store_size": store_size})
    return training.model_copy(
        update={
            "optimizer": optimizer,
            "schedule": _schedule(schedule, training.epochs),
            "augmentation": augmentation,
            "batch_norm": training.batch_norm or ("views" if isinstance(augmentation, CropFlip) else "measured"),
        }
    )


def _quantization(spec: JobSpec) -> Quantization | None:
    """Return the training for int8 with the number of its epochs; None if there is none."""
    epochs = aware_epochs(spec)
    return Quantization(epochs=epochs) if epochs else None


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


def _fine_tuning(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer with the defaults of fine-tuning in the fields that were not given."""
    defaults = FINE_TUNING[type(optimizer)]
    return optimizer.model_copy(
        update={name: value for name, value in defaults.items() if name not in optimizer.model_fields_set}
    )


def _schedule(schedule: Schedule, epochs: int) -> Schedule:
    if not isinstance(schedule, Multistep) or schedule.milestones is not None:
        return schedule
    crd = (round(epochs * drop / 240) for drop in (150, 180, 210))
    return schedule.model_copy(update={"milestones": tuple(sorted({drop for drop in crd if 1 <= drop < epochs}))})


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
