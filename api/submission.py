"""From a client's body to a job that can work, or to every reason why it cannot, all in one answer.

read        the body alone: fields, types, bounds, rules between fields
look up     what it names: data set, teacher, baseline
fit         classes, channels, image size
resolve     every default spelled out, every name replaced by the bytes that it means now
"""

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

from api.references import Faulty, Found, Shelves
from kdcore.catalog import DATASETS, ArchitectureFacts, DatasetFacts, ModelFacts, UnknownName, architecture
from kdcore.errors import Fault
from kdcore.spec import Dataset, JobSpec, Student, Teacher, as_typed, fit, read, resolve
from store.jobs import Job

T = TypeVar("T")


@dataclass(frozen=True)
class Examined:
    """A body, read to the end: with no faults there is a resolved spec."""

    faults: list[Fault]
    resolved: JobSpec | None = None
    dataset: DatasetFacts | None = None
    teacher: ModelFacts | None = None


async def examine(body: Any, shelves: Shelves) -> Examined:
    spec, fields, faults = read(body)
    named_dataset, named_teacher, student = fields.get("dataset"), fields.get("teacher"), fields.get("student")
    data: Found[DatasetFacts] | None = None
    taught: Found[ModelFacts] | None = None
    if isinstance(named_dataset, Dataset):
        data = await _look_up(shelves.dataset(named_dataset), "/dataset/source", faults)
    if isinstance(named_teacher, Teacher):
        taught = await _look_up(shelves.teacher(named_teacher), "/teacher/checkpoint", faults)
    dataset = data.facts if data else None
    teacher = taught.facts if taught else None
    baseline = fields.get("baseline", "none")
    alone: Found[Job] | None = None
    if baseline not in ("none", "train"):
        alone = await _look_up(shelves.baseline(baseline, data, student), "/baseline", faults)
    learner: Found[ArchitectureFacts] | None = None
    if isinstance(student, Student) and dataset is not None:
        learner = await _look_up(shelves.student(student, dataset), "/student/architecture", faults)
    faults += fit(fields, dataset, _comparable(teacher, data), learner.facts if learner else None)
    if faults or spec is None or data is None or dataset is None:
        return Examined(as_typed(faults, body), dataset=dataset, teacher=teacher)
    return Examined([], _by_digest(resolve(spec, dataset, teacher), data, taught, alone), dataset, teacher)


def _comparable(teacher: ModelFacts | None, data: Found[DatasetFacts] | None) -> ModelFacts | None:
    """A named set's class names may be known only once it is fetched: the teacher's are not held against it here."""
    named = DATASETS.get(data.reference) if data else None
    if teacher is None or named is None or named.class_names:
        return teacher
    return teacher.model_copy(update={"class_names": None})


async def _look_up(search: Awaitable[Found[T]], pointer: str, faults: list[Fault]) -> Found[T] | None:
    try:
        return await search
    except Faulty as faulty:
        faults.append(faulty.at(pointer))
        return None


def _architecture(student: Student | Teacher | None) -> ArchitectureFacts | None:
    if student is None or student.architecture is None:
        return None
    try:
        return architecture(student.architecture)
    except UnknownName:
        return None


def _by_digest(
    spec: JobSpec, data: Found[DatasetFacts], taught: Found[ModelFacts] | None, alone: Found[Job] | None
) -> JobSpec:
    """Names may come to mean other bytes; what an accepted job means must not."""
    image_size = spec.dataset.image_size
    if image_size is None and data.facts is not None and data.facts.kind == "folders":
        image_size = data.facts.image_size[0]
    update: dict[str, Any] = {"dataset": Dataset(source=data.reference, image_size=image_size)}
    if spec.teacher is not None and taught is not None:
        update["teacher"] = spec.teacher.model_copy(update={"checkpoint": taught.reference})
    if alone is not None:
        update["baseline"] = alone.reference
    return spec.model_copy(update=update)


def estimate(examined: Examined) -> dict[str, Any] | None:
    """What can be counted before anything has run. Seconds and accuracy cannot, so they are not given."""
    spec, dataset = examined.resolved, examined.dataset
    if spec is None or dataset is None:
        return None
    teacher = examined.teacher.parameters if examined.teacher else _parameters(spec.teacher, dataset)
    student = _parameters(spec.student, dataset)
    return {
        "steps": _steps(spec, dataset),
        "parameters": {"teacher": teacher, "student": student},
        "compression": round(teacher / student, 2) if teacher and student else None,
    }


def _steps(spec: JobSpec, dataset: DatasetFacts) -> int:
    """Every batch is whole, and what is held out is not trained on."""
    held_out = round(dataset.train * spec.training.validation_fraction)
    an_epoch = (dataset.train - held_out) // spec.training.batch_size
    trials = 2 if spec.baseline == "train" else 1
    return trials * spec.training.epochs * an_epoch


def _parameters(model: Student | Teacher | None, dataset: DatasetFacts) -> int | None:
    facts = _architecture(model)
    return facts.parameters(dataset.num_classes, dataset.channels) if facts else None
