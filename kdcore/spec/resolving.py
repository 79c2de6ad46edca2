"""Spell out every default, once the data and the teacher are known. Resolving twice changes nothing."""

from kdcore.catalog import DatasetFacts, ModelFacts
from kdcore.spec.methods import Kd
from kdcore.spec.vocabulary import (
    Augmentation,
    CropFlip,
    JobSpec,
    Multistep,
    NoAugmentation,
    Preprocessing,
    RandomResizedCrop,
    Schedule,
    Teacher,
    Training,
)


def resolve(spec: JobSpec, dataset: DatasetFacts, teacher: ModelFacts | None) -> JobSpec:
    """The spec with nothing left to guess; `teacher` is None without one, or where only a download will tell."""
    temperature, alpha, beta = _weights(spec)
    of_student = spec.student.preprocessing or preprocessing(None, dataset)
    return spec.model_copy(
        update={
            "temperature": temperature,
            "alpha": alpha,
            "beta": beta,
            "teacher": spec.teacher and _teacher(spec.teacher, teacher, dataset),
            "student": spec.student.model_copy(update={"preprocessing": of_student}),
            "training": _training(spec.training, dataset),
        }
    )


def preprocessing(model: ModelFacts | None, dataset: DatasetFacts) -> Preprocessing:
    """The model's own normalisation where its file says one, else the data's mean and std."""
    if model is not None and model.mean and model.std:
        return Preprocessing(mean=tuple(model.mean), std=tuple(model.std))
    return Preprocessing(mean=tuple(dataset.mean), std=tuple(dataset.std))


def _weights(spec: JobSpec) -> tuple[float | None, float | None, float | None]:
    """Temperature, alpha and beta; None where the method has no use for them."""
    if not isinstance(spec.method, Kd):
        return None, _given(spec.alpha, 1.0), None
    standardized = spec.method.standardize
    temperature = None if spec.method.form == "logits_l2" else _given(spec.temperature, 2.0 if standardized else 4.0)
    return temperature, _given(spec.alpha, 0.1), _given(spec.beta, 9.0 if standardized else 0.9)


def _teacher(asked: Teacher, facts: ModelFacts | None, dataset: DatasetFacts) -> Teacher:
    if facts is None:
        return asked
    own = asked.preprocessing or preprocessing(facts, dataset)
    return asked.model_copy(update={"architecture": facts.architecture, "preprocessing": own})


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
