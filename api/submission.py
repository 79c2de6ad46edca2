"""The check of a client's body: a resolved spec, or every fault at once.

read        check the body alone: fields, types, bounds, rules between fields
look up     get the facts of what it names: data set, teacher, baseline, networks
fit         compare classes, channels, image size
resolve     write out every default, and replace every name by the digest of its present bytes
"""

from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from api.references import ReferenceFault, References, Target, as_colour
from base.errors import Fault, WarningRefused
from base.warning import WarningItem, refused_if_strict, warning_faults
from kdcore.catalog import DATASETS, ArchitectureFacts, DatasetFacts, LogitsFacts, ModelFacts, ProgramFacts, StartFacts
from kdcore.spec import (
    DataOptions,
    Dataset,
    EvaluationSpec,
    JobSpec,
    Known,
    Student,
    Teacher,
    Unlabelled,
    alone,
    as_typed,
    data_differences,
    differences,
    each_assistant,
    each_method,
    each_start,
    each_student,
    each_teacher,
    evaluation_warnings,
    fit,
    fit_evaluation,
    grey_as_colour,
    not_the_own_images,
    read,
    resolve,
    resolve_evaluation,
    spec_warnings,
    tags_without_weights,
)
from kdcore.spec.fitting import teacher_size
from kdcore.spec.job import TRAINED_BASELINES
from kdcore.spec.shipping import not_installed
from store.records import Job

T = TypeVar("T")


@dataclass(frozen=True)
class Examined:
    """The result of the check: a resolved spec, or faults."""

    faults: list[Fault]
    resolved: JobSpec | None = None
    known: Known = field(default_factory=Known)
    warnings: list[WarningItem] = field(default_factory=list)

    @property
    def is_refused_for_warnings(self) -> bool:
        """True if the spec is valid, but `strict`, and something about it is doubtful."""
        return bool(self.faults) and all(fault.code == WarningRefused.code for fault in self.faults)


@dataclass
class Lookup:
    """The targets of a spec's references. Each reference without a target has a fault in `faults`."""

    references: References
    fields: Mapping[str, Any]
    faults: list[Fault]
    data: Target[DatasetFacts] | None = None
    pool: Target[DatasetFacts] | None = None
    teachers: dict[str, Target[ModelFacts]] = field(default_factory=dict)
    """By the reference's pointer."""
    starts: dict[str, Target[StartFacts]] = field(default_factory=dict)
    """By the pointer of the student or assistant."""
    baseline: Target[Job] | None = None
    networks: dict[str, ArchitectureFacts] = field(default_factory=dict)
    shapes: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    read_as_colour: bool = False
    """True if grey images get three channels only because the teachers take three."""

    @property
    def known(self) -> Known:
        return Known(
            dataset=_comparable(self.data) if self.data else None,
            unlabelled=self.pool.facts if self.pool else None,
            teachers={at: one.facts for at, one in self.teachers.items() if one.facts},
            starts={at: one.facts for at, one in self.starts.items() if one.facts},
            inspected=self.networks,
            shapes=self.shapes,
        )

    async def run(self) -> None:
        await self._data()
        for pointer, teacher in each_teacher(self.fields):
            named = next(
                (one for one in ("program", "logits", "checkpoint") if getattr(teacher, one) is not None), None
            )
            if named is None:
                continue
            if target := await self._find(self.references.teacher(teacher), f"{pointer}/{named}"):
                self.teachers[pointer] = target
        self._grey_as_colour()
        baseline = self.fields.get("baseline", "none")
        if baseline not in ("none", *TRAINED_BASELINES):
            self.baseline = await self._find(self.references.baseline(baseline), "/baseline")
        if self.data is not None and self.data.facts is not None:
            await self._networks(self.data.facts)
            await self._starts(self.data.facts)
            await self._taps(self.data.facts)

    async def _data(self) -> None:
        dataset, unlabelled = self.fields.get("dataset"), self.fields.get("unlabelled")
        if isinstance(dataset, Dataset):
            self.data = await self._find(self.references.dataset(dataset), "/dataset/source")
        if isinstance(unlabelled, Unlabelled):
            options = self.data.options if self.data else dataset if isinstance(dataset, Dataset) else DataOptions()
            pool = Dataset.of(unlabelled.source, options.for_unlabelled())
            # The spec has one set of options: the engine reads both alike.
            search = self.references.dataset(pool, size_at="/unlabelled/source", as_registered=False)
            self.pool = await self._find(search, "/unlabelled/source")
            same_name = isinstance(dataset, Dataset) and dataset.source == unlabelled.source
            if self.data and self.pool and self.data.reference == self.pool.reference and not same_name:
                self.faults.append(not_the_own_images(unlabelled))

    def _grey_as_colour(self) -> None:
        """Read grey images with three channels if that is what the teachers take, and nothing else was asked for."""
        channels = {target.facts.channels for target in self.teachers.values() if target.facts}
        if channels == {3} and self.data is not None:
            given = self.data
            self.data = as_colour(given)
            self.read_as_colour = self.data is not given
            self.pool = as_colour(self.pool) if self.pool is not None else None

    async def _networks(self, data: DatasetFacts) -> None:
        """Look up each network of the job once: timm's networks must be built for that."""
        names = [
            (f"{at}/architecture", one.architecture, data)
            for at, one in (*each_student(self.fields), *each_assistant(self.fields))
        ]
        for at, teacher in each_teacher(self.fields):
            if network := self._network_of(at, teacher):
                pointer = f"{at}/architecture" if teacher.architecture else f"{at}/checkpoint"
                names.append((pointer, network, self._shown_to(at, teacher, data)))
        for pointer, name, shown in names:
            if name not in self.networks:
                target = await self._find(self.references.network(name, shown), pointer)
                if target is not None and target.facts is not None:
                    self.networks[name] = target.facts

    async def _starts(self, data: DatasetFacts) -> None:
        """Look up what students start from, unless a fault of the network is known: it could not be built."""
        for pointer, student in each_start(self.fields):
            network = self.networks.get(student.architecture)
            if network is None or network.channels not in ("any", data.channels):
                continue
            if target := await self._find(self.references.start(student, data), f"{pointer}/checkpoint"):
                self.starts[pointer] = target

    async def _taps(self, data: DatasetFacts) -> None:
        """Look up the shapes of the taps that methods name: a network must be built to check a path."""
        students, teachers = each_student(self.fields), each_teacher(self.fields)
        if not students:
            return
        student = students[0][1].architecture
        teacher = self._network_of(*teachers[0]) if teachers else student
        shown = self._shown_to(*teachers[0], data) if teachers else data
        for pointer, method in each_method(self.fields):
            for field_name, side, paths in method.named_places():
                network = teacher if side == "teacher" else student
                if network is not None and paths:
                    seen = shown if side == "teacher" else data
                    await self._shapes(network, paths, seen, f"{pointer}/{field_name}")

    def _network_of(self, pointer: str, teacher: Teacher) -> str | None:
        """Return the network of a teacher's taps; None for a program, or for logits alone."""
        if teacher.program is not None or teacher.logits is not None:
            return None
        target = self.teachers.get(pointer)
        if target and isinstance(target.facts, ProgramFacts):
            return None
        return target.facts.architecture if target and target.facts else teacher.architecture

    def _shown_to(self, pointer: str, teacher: Teacher, data: DatasetFacts) -> DatasetFacts:
        """Return the data's facts with the size of the images that a teacher gets."""
        size = teacher_size(self.fields, replace(self.known, dataset=data), pointer, teacher)
        return data.model_copy(update={"image_size": size})

    async def _shapes(self, network: str, paths: tuple[str, ...], data: DatasetFacts, pointer: str) -> None:
        target = await self._find(self.references.taps(network, paths, data), pointer)
        if target is not None and target.facts is not None:
            self.shapes |= {(network, path): shape for path, shape in target.facts.items()}

    async def _find(self, search: Awaitable[Target[T]], pointer: str) -> Target[T] | None:
        try:
            return await search
        except ReferenceFault as fault:
            self.faults.append(fault.at(pointer))
            return None


async def examine(body: Any, references: References) -> Examined:
    spec, fields, faults = read(body)
    lookup = Lookup(references, fields, faults)
    await lookup.run()
    known = lookup.known
    faults += tags_without_weights(fields)
    faults += fit(fields, known)
    if references.one_installation:
        faults += not_installed(fields.get("export", ()))
    if spec is not None and lookup.data is not None and known.dataset is not None:
        faults += _baseline_faults(spec, lookup, lookup.data, known.dataset)
    if faults or spec is None or lookup.data is None or known.dataset is None:
        return Examined(as_typed(faults, body), known=known)
    spec = spec.model_copy(update={"dataset": Dataset.of(spec.dataset.source, lookup.data.options)})
    warnings = spec_warnings(spec, known)
    if lookup.read_as_colour:
        warnings.append(grey_as_colour())
    if spec.strict and (refused := refused_if_strict(warnings)):
        return Examined(as_typed(warning_faults(refused), body), known=known, warnings=warnings)
    resolved = _by_digest(resolve(spec, known), lookup, lookup.data, known.dataset)
    if spec.baseline == "train" and spec.seeds == 1:  # Of several seeds, each has a baseline of its own.
        found = await references.trained_alone(resolved, known.dataset)
        if found is not None and found.facts is not None:
            resolved = resolved.model_copy(update={"baseline": found.reference})
            warnings.append(_baseline_found(found.facts))
    return Examined([], resolved, known, warnings)


def _baseline_found(job: Job) -> WarningItem:
    text = f"the student alone is that of job {job.id}, which trained it from the same data, recipe and seed"
    return WarningItem("baseline_found", "/baseline", text, "to train it again, give 'baseline': 'train_anew'")


def _comparable(data: Target[DatasetFacts]) -> DatasetFacts | None:
    """Return the data's facts, without class names if they are known only after a download: then the engine compares
    them with the teacher's."""
    built_in = DATASETS.get(data.reference)
    if data.facts is None or built_in is None or built_in.class_names:
        return data.facts
    return data.facts.model_copy(update={"class_names": []})


def _baseline_faults(spec: JobSpec, lookup: Lookup, data: Target[DatasetFacts], facts: DatasetFacts) -> Iterator[Fault]:
    """Yield the fault of a baseline that is not this job's student alone, with every field that differs."""
    job = lookup.baseline.facts if lookup.baseline is not None else None
    if job is None or not facts.labelled:
        return
    first, _ = each_student(vars(spec))[0]
    starts = {"/student": lookup.known.starts[first]} if first in lookup.known.starts else {}
    mine = resolve(alone(spec), Known(dataset=facts, starts=starts))
    student = _student_by_digest(mine.students[0], lookup.starts.get(first))
    mine = mine.model_copy(update={"dataset": _data_by_digest(lookup, data, facts), "student": student})
    stored = (job.result or {}).get("dataset", {})
    if found := [*differences(mine, job.resolved_spec), *data_differences(facts, stored)]:
        text = f"job {job.id} did not train the same student alone: {'; '.join(map(str, found))}"
        allowed = [f"{one.field}: {one.here}" for one in found]
        got = [f"{one.field}: {one.there}" for one in found]
        yield Fault("/baseline", text, "not_allowed", allowed, got)


@dataclass(frozen=True)
class ExaminedEvaluation:
    """The result of the check of an evaluation: a resolved spec, or faults."""

    faults: list[Fault]
    resolved: EvaluationSpec | None = None
    warnings: list[WarningItem] = field(default_factory=list)
    is_refused_for_warnings: bool = False


async def examine_evaluation(spec: EvaluationSpec, model: ModelFacts, references: References) -> ExaminedEvaluation:
    """Check an evaluation of a registered model. Pointers are those of the request, whose path names the model."""
    try:
        given = await references.dataset(spec.dataset, size_at="/image_size")
    except ReferenceFault as fault:
        at = (
            fault.pointer if fault.pointer == "/image_size" else "/dataset"
        )  # A request has no other option of the data.
        return ExaminedEvaluation([replace(fault.at("/dataset"), pointer=at)])
    data = as_colour(given) if model.channels == 3 else given
    facts = _comparable(data)
    assert facts is not None, "a data set is inspected, or built in"  # noqa: S101
    spec = spec.model_copy(update={"dataset": Dataset.of(spec.dataset.source, data.options)})
    if faults := fit_evaluation(spec, model, facts):
        return ExaminedEvaluation([replace(fault, pointer=_of_request(fault.pointer)) for fault in faults])
    warnings = [*evaluation_warnings(spec, model, facts), *([grey_as_colour()] if data is not given else [])]
    if spec.strict and (refused := refused_if_strict(warnings)):
        return ExaminedEvaluation(warning_faults(refused), warnings=warnings, is_refused_for_warnings=True)
    dataset = _resolved_data(data, facts)
    resolved = resolve_evaluation(spec, model, facts).model_copy(update={"dataset": dataset})
    return ExaminedEvaluation([], resolved, warnings)


def _of_request(pointer: str) -> str:
    """Return the field of the request; what does not fit the model is the data set's fault."""
    own = ("/model/preprocessing", "/model/class_map")
    return pointer.removeprefix("/model") if pointer.startswith(own) else "/dataset"


def _by_digest(spec: JobSpec, lookup: Lookup, data: Target[DatasetFacts], facts: DatasetFacts) -> JobSpec:
    """Replace names by digests: a name can be given to other bytes later, and an accepted job must not change."""
    update: dict[str, Any] = {"dataset": _data_by_digest(lookup, data, facts)}
    if spec.unlabelled is not None and lookup.pool is not None:
        update["unlabelled"] = spec.unlabelled.model_copy(update={"source": lookup.pool.reference})
    teachers = tuple(_teacher_by_digest(teacher, lookup.teachers[at]) for at, teacher in each_teacher(vars(spec)))
    if teachers:
        update["teacher"] = teachers if isinstance(spec.teacher, tuple) else teachers[0]
    students = tuple(_student_by_digest(one, lookup.starts.get(at)) for at, one in each_student(vars(spec)))
    update["student"] = students if isinstance(spec.student, tuple) else students[0]
    assistants = (_student_by_digest(one, lookup.starts.get(at)) for at, one in each_assistant(vars(spec)))
    update["assistants"] = tuple(assistants)
    if lookup.baseline is not None:
        update["baseline"] = lookup.baseline.reference
    return spec.model_copy(update=update)


def _data_by_digest(lookup: Lookup, data: Target[DatasetFacts], facts: DatasetFacts) -> Dataset:
    """Return the data set of a resolved spec. Unlabelled images in folders are resized to the size of the labelled."""
    pool = lookup.pool.facts if lookup.pool else None
    return _resolved_data(data, facts, pool is not None and pool.kind == "folders")


def _resolved_data(data: Target[DatasetFacts], facts: DatasetFacts, resized: bool = False) -> Dataset:
    """Return the data set with its options. Images in folders are read at the size at which they were inspected, as
    their files may differ; it is None if it is not square."""
    options, (height, width) = data.options, facts.image_size
    if options.image_size is None and (facts.kind == "folders" or resized) and height == width:
        options = options.model_copy(update={"image_size": height})
    return Dataset.of(data.reference, options).resolved()


def _student_by_digest(student: Student, start: Target[StartFacts] | None) -> Student:
    return student if start is None else student.model_copy(update={"checkpoint": start.reference})


def _teacher_by_digest(teacher: Teacher, target: Target[ModelFacts]) -> Teacher:
    if isinstance(target.facts, ProgramFacts):
        return teacher.model_copy(update={"checkpoint": None, "program": target.reference})
    if isinstance(target.facts, LogitsFacts):
        return teacher.model_copy(update={"logits": target.reference})
    return teacher.model_copy(update={"checkpoint": target.reference})
