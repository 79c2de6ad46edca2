"""From a client's body to a job that can work, or to every reason why it cannot, all in one answer.

read        the body alone: fields, types, bounds, rules between fields
look up     what it names: data set, teacher, baseline
fit         classes, channels, image size
resolve     every default spelled out, every name replaced by the bytes that it means now
"""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from api.references import Faulty, Found, Shelves
from base.errors import Fault
from kdcore.catalog import DATASETS, ArchitectureFacts, DatasetFacts, ModelFacts
from kdcore.spec import (
    Dataset,
    JobSpec,
    Known,
    Teacher,
    Unlabelled,
    as_typed,
    each_assistant,
    each_method,
    each_student,
    each_teacher,
    fit,
    not_the_own_images,
    read,
    resolve,
    trials,
)
from store.jobs import Job

T = TypeVar("T")


@dataclass(frozen=True)
class Examined:
    """A body, read to the end: with no faults there is a resolved spec."""

    faults: list[Fault]
    resolved: JobSpec | None = None
    known: Known = field(default_factory=Known)


@dataclass
class Lookup:
    """What was found of all that a spec names, and what was not."""

    shelves: Shelves
    fields: Mapping[str, Any]
    faults: list[Fault]
    data: Found[DatasetFacts] | None = None
    pool: Found[DatasetFacts] | None = None
    taught: dict[str, Found[ModelFacts]] = field(default_factory=dict)
    """By pointer."""
    alone: Found[Job] | None = None
    networks: dict[str, ArchitectureFacts] = field(default_factory=dict)
    shapes: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    @property
    def known(self) -> Known:
        return Known(
            dataset=self.data.facts if self.data else None,
            unlabelled=self.pool.facts if self.pool else None,
            teachers={at: _comparable(found.facts, self.data) for at, found in self.taught.items() if found.facts},
            inspected=self.networks,
            shapes=self.shapes,
        )

    async def run(self) -> None:
        await self._data()
        for pointer, teacher in each_teacher(self.fields):
            at = f"{pointer}/program" if teacher.program is not None else f"{pointer}/checkpoint"
            if teacher.program is None and teacher.checkpoint is None:
                continue
            if found := await self._find(self.shelves.teacher(teacher), at):
                self.taught[pointer] = found
        students = each_student(self.fields)
        baseline = self.fields.get("baseline", "none")
        if baseline not in ("none", "train"):
            first = students[0][1] if students else None
            self.alone = await self._find(self.shelves.baseline(baseline, self.data, first), "/baseline")
        if self.data is not None and self.data.facts is not None:
            await self._networks(self.data.facts)
            await self._taps(self.data.facts)

    async def _data(self) -> None:
        dataset, unlabelled = self.fields.get("dataset"), self.fields.get("unlabelled")
        if isinstance(dataset, Dataset):
            self.data = await self._find(self.shelves.dataset(dataset), "/dataset/source")
        if isinstance(unlabelled, Unlabelled):
            size = dataset.image_size if isinstance(dataset, Dataset) else None
            pool = Dataset(source=unlabelled.source, image_size=size)
            search = self.shelves.dataset(pool, size_at="/unlabelled/source")
            self.pool = await self._find(search, "/unlabelled/source")
            named_so = isinstance(dataset, Dataset) and dataset.source == unlabelled.source
            if self.data and self.pool and self.data.reference == self.pool.reference and not named_so:
                self.faults.append(not_the_own_images(unlabelled))

    async def _networks(self, data: DatasetFacts) -> None:
        """Each network that a job builds, once: some are known only by building them."""
        named = [(f"{at}/architecture", student.architecture) for at, student in each_student(self.fields)]
        named += [(f"{at}/architecture", assistant.architecture) for at, assistant in each_assistant(self.fields)]
        for at, teacher in each_teacher(self.fields):
            if network := self._taught_by(at, teacher):
                named.append((f"{at}/architecture" if teacher.architecture else f"{at}/checkpoint", network))
        for pointer, name in named:
            if name not in self.networks:
                found = await self._find(self.shelves.network(name, data), pointer)
                if found is not None and found.facts is not None:
                    self.networks[name] = found.facts

    async def _taps(self, data: DatasetFacts) -> None:
        """Look at what methods tap: only building a network tells whether a path that was named is there."""
        students, teachers = each_student(self.fields), each_teacher(self.fields)
        if not students:
            return
        student = students[0][1].architecture
        teacher = self._taught_by(*teachers[0]) if teachers else student
        for pointer, method in each_method(self.fields):
            for field_name, side, paths in method.named_places():
                network = teacher if side == "teacher" else student
                if network is not None and paths:
                    await self._shapes(network, paths, data, f"{pointer}/{field_name}")

    def _taught_by(self, pointer: str, teacher: Teacher) -> str | None:
        """The network whose insides a teacher shows. A program shows none."""
        if teacher.program is not None:
            return None
        found = self.taught.get(pointer)
        return found.facts.architecture if found and found.facts else teacher.architecture

    async def _shapes(self, network: str, paths: tuple[str, ...], data: DatasetFacts, pointer: str) -> None:
        found = await self._find(self.shelves.taps(network, paths, data), pointer)
        if found is not None and found.facts is not None:
            self.shapes |= {(network, path): shape for path, shape in found.facts.items()}

    async def _find(self, search: Awaitable[Found[T]], pointer: str) -> Found[T] | None:
        try:
            return await search
        except Faulty as faulty:
            self.faults.append(faulty.at(pointer))
            return None


async def examine(body: Any, shelves: Shelves) -> Examined:
    spec, fields, faults = read(body)
    lookup = Lookup(shelves, fields, faults)
    await lookup.run()
    known = lookup.known
    faults += fit(fields, known)
    if faults or spec is None or lookup.data is None or known.dataset is None:
        return Examined(as_typed(faults, body), known=known)
    return Examined([], _by_digest(resolve(spec, known), lookup, lookup.data, known.dataset), known)


def _comparable(teacher: ModelFacts, data: Found[DatasetFacts] | None) -> ModelFacts:
    """A named set's class names may be known only once it is fetched: the teacher's are not held against it here."""
    named = DATASETS.get(data.reference) if data else None
    return teacher if named is None or named.class_names else teacher.model_copy(update={"class_names": None})


def _by_digest(spec: JobSpec, lookup: Lookup, data: Found[DatasetFacts], facts: DatasetFacts) -> JobSpec:
    """Names may come to mean other bytes; what an accepted job means must not."""
    update: dict[str, Any] = {"dataset": Dataset(source=data.reference, image_size=_size(spec, lookup, facts))}
    if spec.unlabelled is not None and lookup.pool is not None:
        update["unlabelled"] = spec.unlabelled.model_copy(update={"source": lookup.pool.reference})
    teachers = tuple(_teacher_by_digest(teacher, lookup.taught[at]) for at, teacher in each_teacher(vars(spec)))
    if teachers:
        update["teacher"] = teachers if isinstance(spec.teacher, tuple) else teachers[0]
    if lookup.alone is not None:
        update["baseline"] = lookup.alone.reference
    return spec.model_copy(update=update)


def _size(spec: JobSpec, lookup: Lookup, facts: DatasetFacts) -> int | None:
    """Pictures in folders were inspected at a size that their bytes need not say; one that is not square they do."""
    height, width = facts.image_size
    pool = lookup.pool.facts if lookup.pool else None
    in_folders = facts.kind == "folders" or (pool is not None and pool.kind == "folders")
    return height if spec.dataset.image_size is None and in_folders and height == width else spec.dataset.image_size


def _teacher_by_digest(teacher: Teacher, found: Found[ModelFacts]) -> Teacher:
    name = "program" if teacher.program is not None else "checkpoint"
    return teacher.model_copy(update={name: found.reference})


def estimate(examined: Examined) -> dict[str, Any] | None:
    """What can be counted before anything has run. Seconds and accuracy cannot, so they are not given."""
    spec, known = examined.resolved, examined.known
    if spec is None or known.dataset is None:
        return None
    teacher = _taught(spec, known)
    student = _parameters(spec.students[0].architecture, known)
    return {
        "steps": sum(stage.steps for trial in trials(spec, known.dataset, known.unlabelled) for stage in trial.stages),
        "parameters": {"teacher": teacher, "student": student},
        "compression": round(teacher / student, 2) if teacher and student else None,
    }


def _taught(spec: JobSpec, known: Known) -> int | None:
    """Parameters of all teachers together; None without one, or where only a download will tell."""
    counts = [
        known.teachers[at].parameters if at in known.teachers else _parameters(teacher.architecture, known)
        for at, teacher in each_teacher(vars(spec))
    ]
    return None if not counts or None in counts else sum(filter(None, counts))


def _parameters(name: str | None, known: Known) -> int | None:
    network = known.network(name)
    if network is None or known.dataset is None:
        return None
    return network.parameters(known.dataset.num_classes, known.dataset.channels)
