"""The look-up of a spec's references: data sets, teachers, a baseline, networks. A failure is a fault of the spec."""

import asyncio
import difflib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from anyio import to_thread
from pydantic import BaseModel

from api.auth import Member
from api.inspections import NOT_UPLOADED, Inspections, Refused, while_wanted
from base.errors import Fault
from base.references import ALONE_FILE, BLOB, DIGEST, FILE, JOB, STUDENT_FILE
from base.text import STORED
from kdcore.catalog import (
    DATASETS,
    ArchitectureFacts,
    DatasetFacts,
    ModelFacts,
    NamedStartFacts,
    PublishedFacts,
    StartFacts,
    TapFacts,
    architecture,
    libraries,
    named_facts,
)
from kdcore.catalog.architectures import hidden_layers
from kdcore.catalog.facts import LogitsFacts, ProgramFacts, model_facts
from kdcore.spec import DataOptions, Dataset, JobSpec, Student, Teacher, baseline_key, data_differences
from kdcore.spec.resolving import loaded_as
from store import artifacts, jobs, projects, registry
from store.database import Database
from store.errors import NotFound
from store.records import Job
from store.registry import Entry, EntryQuery, Registry

_OF_FILES = ("orientation", "skip_unreadable", "class_names", "encoding")
"""Options that have no meaning for built-in data sets."""

NO_OPTIONS = DataOptions()

WAIT_S = 20.0
"""The longest wait for an inspection that counts no images yet; less than the 30 s after which clients give up."""
POLL_S = 0.2

COMPARED = 200
"""The most names among which one that is like an unknown one is looked for: that takes 0.1 ms a name."""

T = TypeVar("T")
E = TypeVar("E", bound=Entry)
F = TypeVar("F", bound=BaseModel)


@dataclass(frozen=True)
class Target(Generic[T]):
    """The target of a reference: its facts, if they are known, and the reference for the resolved spec."""

    facts: T | None
    reference: str
    options: DataOptions = NO_OPTIONS
    """How a data set is read: the options of the spec, and those of its registration."""


class ReferenceFault(Exception):
    """A reference that cannot be used."""

    def __init__(
        self, message: str, code: str = "not_found", allowed: Any = None, got: Any = None, pointer: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.allowed, self.got, self.pointer = message, code, allowed, got, pointer

    def at(self, pointer: str) -> Fault:
        """Return the fault at `pointer`, the reference itself, unless another field of the spec has caused it."""
        return Fault(self.pointer or pointer, self.message, self.code, self.allowed, self.got)


@dataclass(frozen=True)
class References:
    """Looks up references within what one caller may see. Every method raises ReferenceFault."""

    db: Database
    inspections: Inspections
    caller: Member
    client_gone: Callable[[], Awaitable[bool]]
    """Tells whether the client has closed the connection: then nobody needs its inspections."""
    one_installation: bool = False
    """True if the workers have the packages of this process, as in the embedded server: then it is known here whether
    they can write a file of a format."""

    async def dataset(
        self, dataset: Dataset, size_at: str = "/dataset/image_size", as_registered: bool = True
    ) -> Target[DatasetFacts]:
        """Look up a data set. `size_at`: the field that is at fault if the images cannot have the requested size.
        `as_registered`: options that are not given are those of its registration."""
        source = dataset.source
        if source.startswith(FILE):
            raise ReferenceFault(
                "the service opens no files by path; upload the data and register it", "not_allowed", got=source
            )
        if source.startswith("blob:"):
            digest = await self._digest(source)
            return Target(await self._data_facts(digest, dataset), source, dataset.options)
        try:
            registered = await self.ready(registry.datasets, source)
        except NotFound:
            # A registered name hides a built-in one: without internet, a user registers a cifar100 of their own.
            if source in DATASETS:
                return Target(_named(source, dataset, size_at), source, dataset.options)
            names = [*DATASETS, *await self._names(registry.datasets)]
            raise _unknown("data set", source, names) from None
        facts = DatasetFacts.model_validate(registered.facts)
        own = _registered_options(facts)
        options = dataset.over(own) if as_registered else dataset.options
        if facts.is_outdated or not _same_images(options, own, facts):
            facts = await self._data_facts(registered.sha256, options)
        return Target(facts, f"{BLOB}{registered.sha256}", options)

    async def ready(self, kind: Registry[E], name: str) -> E:
        """Return a registered file that has been inspected. Raises NotFound.

        An inspection that has just begun is waited for, because most are short; not one that counts its images.
        """
        until = time.monotonic() + WAIT_S
        entry = await self.db.read(kind.get, self.caller.project, name)
        while entry.state == "inspecting" and entry.progress is None and time.monotonic() < until:
            if await self.client_gone():
                break
            await asyncio.sleep(POLL_S)
            entry = await self.db.read(kind.get, self.caller.project, name)
        if entry.state == "ready":
            return entry
        if entry.state == "refused":
            why = (entry.error or {}).get("message")
            text = f"{kind.kind} {name!r} was refused: {why}; register a file that can be used under this name"
        else:
            counted = "{done:,} of {total:,} images".format(**entry.progress) if entry.progress else "no progress known"
            address = f"GET /v1/{kind.table.name}/{entry.name}"
            text = (
                f"{kind.kind} {name!r} is still being inspected ({counted}); send this again when {address} says ready"
            )
        raise ReferenceFault(text, "not_ready", "state: ready", f"state: {entry.state}")

    async def teacher(self, teacher: Teacher) -> Target[ModelFacts]:
        if teacher.program is not None:
            return await self._uploaded_program(teacher.program)
        if teacher.logits is not None:
            if not teacher.logits.startswith("blob:"):
                text = "the service opens no files by path; upload the logits"
                raise ReferenceFault(text, "not_allowed", got=teacher.logits)
            digest = await self._digest(teacher.logits)
            return Target(await self._file_facts(LogitsFacts, digest), teacher.logits)
        reference = teacher.checkpoint or ""
        kind, _, name = reference.partition(":")
        match kind:
            case "model":
                return await self._registered_model(name, teacher)
            case "job":
                return await self._student_of(name)
            case "blob":
                return await self._uploaded_model(reference, teacher)
            case "weights":
                return Target(await self._of_published(PublishedFacts, reference, name), reference)
        raise ReferenceFault("the service opens no files by path; upload the weights", "not_allowed", got=reference)

    async def start(self, student: Student, data: DatasetFacts) -> Target[StartFacts]:
        """Look up the checkpoint that a student or an assistant starts from, and what of it fits the student."""
        reference = student.checkpoint or ""
        kind, _, name = reference.partition(":")
        match kind:
            case "model":
                model = await self._registered_model(name, Teacher())
                if isinstance(model.facts, ProgramFacts):
                    text = f"model {name!r} is {model.facts.kind}, which cannot be trained: a program only teaches"
                    raise ReferenceFault(text, "not_allowed", "a checkpoint of the architecture", reference)
            case "job":
                model = await self._student_of(name)
            case "blob":
                model = Target(None, f"blob:sha256:{await self._digest(reference)}")
            case "weights":
                model = Target(None, reference)
            case _:
                text = "the service opens no files by path; upload the weights"
                raise ReferenceFault(text, "not_allowed", got=reference)
        network = {"architecture": student.architecture, "classes": data.num_classes, "channels": data.channels}
        options: dict[str, Any] = {**network, "freeze": student.freeze}
        stated = model.facts
        if model.reference.startswith(BLOB):
            chosen: dict[str, object] = {"part": student.part, "averaged": student.averaged}
            if stated is not None and set(chosen.values()) == {None}:
                chosen = loaded_as(stated)  # As it is registered.
            facts = await self._file_facts(StartFacts, model.reference.removeprefix(BLOB), **options, **chosen)
        elif stated is not None:
            source = {"from_classes": stated.num_classes, "from_channels": stated.channels}
            facts = await self._file_facts(NamedStartFacts, stated.architecture, **source, **options)
        else:
            facts = await self._of_published(NamedStartFacts, reference, reference, **options)
        if stated is not None:  # A registration may say more than the file.
            names = ("mean", "std", "class_names")
            facts = facts.model_copy(update={name: getattr(stated, name) or getattr(facts, name) for name in names})
        return Target(facts, model.reference)

    async def _of_published(self, kind: type[F], reference: str, name: str, **options: Any) -> F:
        """Return facts of published weights, which are not downloaded for that."""
        await self._require_known(name.removeprefix("weights:"), "not_found", reference)
        try:
            return await while_wanted(self.inspections.inspect(kind, name, **options), self.client_gone)
        except Refused as refused:
            code = "not_found" if refused.final else refused.code
            raise ReferenceFault(_with_hint(refused), code, got=reference) from None

    async def baseline(self, reference: str) -> Target[Job]:
        """Look up a job that trained a student without a teacher: a supervised job, or one with a baseline of its own.

        `submission` compares its spec with the job's.
        """
        if not reference.startswith(JOB):
            raise ReferenceFault("a baseline is an earlier job's student", "not_allowed", "job:<id>", reference)
        job = await self._distillation(reference.removeprefix(JOB))
        if job.status != "succeeded":
            raise ReferenceFault(
                f"job {job.id} is {job.status}: it has no measured student", "not_ready", got=job.status
            )
        spec = JobSpec.model_validate(job.resolved_spec, context=STORED)
        is_supervised = spec.scheme.kind == "alone"
        if not is_supervised and spec.baseline != "train":
            raise ReferenceFault(
                f"job {job.id} trained no student alone: its method is {job.method}, and its baseline is "
                f"{'none' if spec.baseline == 'none' else 'that of another job'}",
                "not_allowed",
                "a supervised job, or one with baseline: train",
                reference,
            )
        file = await self._student_alone(job, spec)
        if file is None:
            text = f"job {job.id} did not keep its student alone: it ran in an earlier version of the service"
            raise ReferenceFault(text, "not_ready", "a job of this version", reference)
        return Target(job, file)

    async def trained_alone(self, spec: JobSpec, facts: DatasetFacts) -> Target[Job] | None:
        """Find an earlier job of the project that has trained the student alone of a resolved spec, with the same bits
        as far as specs decide them. Raises nothing: without such a job, the baseline is trained."""
        key = baseline_key(spec.as_json())
        for job in await self.db.read(jobs.with_baseline, self.caller.project, key) if key is not None else ():
            read_otherwise = any(data_differences(facts, (job.result or {}).get("dataset", {})))
            rounded_otherwise = any(warning["code"] == "bits_not_repeatable" for warning in job.warnings)
            if read_otherwise or rounded_otherwise:
                continue
            file = await self._student_alone(job, JobSpec.model_validate(job.resolved_spec, context=STORED))
            if file is not None:
                return Target(job, file)
        return None

    async def _student_alone(self, job: Job, spec: JobSpec) -> str | None:
        """Return the reference to the file of the student alone of a finished job, if it has kept one."""
        name = STUDENT_FILE if spec.scheme.kind == "alone" else ALONE_FILE
        try:
            return f"{BLOB}{(await self.db.read(artifacts.get, job.id, name)).sha256}"
        except NotFound:
            return None

    async def network(self, name: str, data: DatasetFacts) -> Target[ArchitectureFacts]:
        """Look up a network. The facts of timm's networks are known only after building them."""
        facts = architecture(name)
        if facts.source == "timm":
            await self._require_known(name, "not_allowed", name)
            facts = await self._network_facts(ArchitectureFacts, data, name)
        return Target(facts, name)

    async def taps(self, name: str, paths: tuple[str, ...], data: DatasetFacts) -> Target[dict[str, list[int]]]:
        """Return the shape of each tap of a network, without the batch."""
        return Target((await self._network_facts(TapFacts, data, name, *paths)).shapes, name)

    async def _registered_model(self, name: str, teacher: Teacher) -> Target[ModelFacts]:
        try:
            model = await self.ready(registry.models, name)
        except NotFound:
            raise _unknown("model", name, await self._names(registry.models)) from None
        facts = model_facts(model.facts)
        # What is chosen of a program is a fault, which `fit` finds.
        if (teacher.part is not None or teacher.averaged is not None) and not isinstance(facts, ProgramFacts):
            chosen = await self._file_facts(ModelFacts, model.sha256, **_choice(facts.architecture, teacher))
            stated = ("mean", "std", "class_names", "image_size")
            facts = chosen.model_copy(update={name: getattr(facts, name) for name in stated})
        return Target(facts, f"{BLOB}{model.sha256}")

    async def _names(self, kind: Registry[Any]) -> list[str]:
        """The newest registered names, among which a similar one is looked for."""
        rows, _ = await self.db.read(kind.list_page, self.caller.project, EntryQuery(limit=100))
        return [row.name for row in rows]

    async def _student_of(self, job_id: str) -> Target[ModelFacts]:
        """Look up the student of a job. Before the job has ended, its facts follow from its spec, and the reference
        remains the job's: `store/teachers.py` replaces it when the job succeeds."""
        job = await self._distillation(job_id)
        if _members(job) > 1:
            text = f"job {job_id} delivers an ensemble of {_members(job)} networks; one of them can teach, not all"
            raise ReferenceFault(text, "not_allowed", got=f"{JOB}{job_id}")
        if job.status in ("failed", "cancelled"):
            text = f"job {job_id} is {job.status}: it has no student that can teach; retry it first"
            raise ReferenceFault(text, "not_ready", got=job.status)
        if job.status != "succeeded" or job.result is None:
            return Target(await self._future_student(job), f"{JOB}{job_id}")
        file = await self.db.read(artifacts.get, job_id, STUDENT_FILE)
        return Target(student_facts(job, file.sha256, file.bytes), f"{BLOB}{file.sha256}")

    async def _future_student(self, job: Job) -> ModelFacts:
        """Return the facts that the student of a job will have, from the job's resolved spec."""
        spec = JobSpec.model_validate(job.resolved_spec, context=STORED)
        student, source = spec.students[0], spec.dataset.source
        if source.startswith(BLOB):
            data = await self._data_facts(source.removeprefix(BLOB), spec.dataset)
        else:
            # A resolved spec has a name only for a built-in set, also if one of that name is registered now.
            data = _named(source, spec.dataset)
        network = (await self.network(student.architecture, data)).facts
        parameters = network.parameters(data.num_classes, data.channels) if network else None
        if parameters is None:
            network = await self._network_facts(ArchitectureFacts, data, student.architecture)
            parameters = network.parameters(data.num_classes, data.channels) or 0
        return ModelFacts(
            architecture=student.architecture,
            num_classes=data.num_classes,
            channels=data.channels,
            parameters=parameters,
            bytes=4 * parameters,
            format="safetensors",
            mean=list(student.preprocessing.mean) if student.preprocessing else None,
            std=list(student.preprocessing.std) if student.preprocessing else None,
            class_names=data.class_names or None,
            image_size=data.image_size,
        )

    async def _uploaded_model(self, reference: str, teacher: Teacher) -> Target[ModelFacts]:
        options = _choice(teacher.architecture, teacher)
        return Target(await self._file_facts(ModelFacts, await self._digest(reference), **options), reference)

    async def _uploaded_program(self, reference: str) -> Target[ModelFacts]:
        if not reference.startswith("blob:"):
            raise ReferenceFault("the service opens no files by path; upload the program", "not_allowed", got=reference)
        return Target(await self._file_facts(ProgramFacts, await self._digest(reference)), reference)

    async def _data_facts(self, digest: str, options: DataOptions) -> DatasetFacts:
        try:
            return await while_wanted(self.inspections.dataset(digest, options), self.client_gone)
        except Refused as refused:
            at = f"/dataset/{refused.option}" if refused.option else None
            raise ReferenceFault(_with_hint(refused), refused.code, pointer=at) from None

    async def _file_facts(self, kind: type[F], digest: str, **options: Any) -> F:
        try:
            return await while_wanted(self.inspections.inspect(kind, digest, **options), self.client_gone)
        except Refused as refused:
            raise ReferenceFault(_with_hint(refused), refused.code) from None

    async def _network_facts(self, kind: type[F], data: DatasetFacts, name: str, *paths: str) -> F:
        """Return the facts of a network that takes the images of this data set."""
        shape: dict[str, Any] = {"classes": data.num_classes, "channels": data.channels, "image_size": data.image_size}
        try:
            return await while_wanted(self.inspections.inspect(kind, name, *paths, **shape), self.client_gone)
        except Refused as refused:
            # A final refusal of a network is a fault of the spec; a timeout or a crash is not.
            code = "not_allowed" if refused.final else refused.code
            raise ReferenceFault(_with_hint(refused), code, got=", ".join(paths) or name) from None

    async def _require_known(self, name: str, code: str, got: str) -> None:
        """Raise ReferenceFault for a network or weights that no library has: no process is started to find that."""
        fault = await to_thread.run_sync(libraries.missing, hidden_layers(name)[0])
        if fault is not None:
            raise ReferenceFault(fault, code, got=got)

    async def _digest(self, reference: str) -> str:
        """Return the hex digest of `blob:sha256:<hex>`, if the project has those bytes."""
        name = reference.removeprefix("blob:")
        if not DIGEST.fullmatch(name):
            raise ReferenceFault("a blob is named sha256: and 64 hexadecimal digits", "not_allowed", got=reference)
        digest = name.removeprefix("sha256:")
        if not await has_blob(self.db, self.inspections, self.caller, digest):
            raise ReferenceFault(NOT_UPLOADED, got=reference)
        return digest

    async def _distillation(self, job_id: str) -> Job:
        """Return a job that trains a student."""
        try:
            job = await self.db.read(jobs.get, job_id, project=self.caller.project)
        except NotFound:
            raise ReferenceFault(f"there is no job {job_id!r}", got=f"{JOB}{job_id}") from None
        if job.kind != "distillation":
            text = f"job {job_id} is an {job.kind}: it trains no student"
            raise ReferenceFault(text, "not_allowed", "a job that trains a student", f"{JOB}{job_id}")
        return job


async def has_blob(db: Database, inspections: Inspections, caller: Member, digest: str) -> bool:
    """Return True if the caller's project has a blob. What other projects have is not looked at."""
    return await db.read(projects.has_blob, caller.project, digest) and await inspections.has(digest)


def _choice(architecture: str | None, teacher: Teacher) -> dict[str, Any]:
    """Return the options of a checkpoint's inspection."""
    options = {"architecture": architecture, "part": teacher.part, "averaged": teacher.averaged}
    return {name: value for name, value in options.items() if value is not None}


def _student(job: Job) -> dict[str, Any]:
    """Return the student that a job delivers: the first, if several taught each other."""
    student = job.resolved_spec["student"]
    first: dict[str, Any] = student[0] if isinstance(student, list) else student
    return first


def _members(job: Job) -> int:
    """Return the number of networks in a job's file: all generations, if their ensemble was requested."""
    scheme = JobSpec.model_validate(job.resolved_spec, context=STORED).scheme
    return scheme.generations if scheme.ensemble_is_result else 1


def student_facts(job: Job, digest: str, size: int) -> ModelFacts:
    """Return the facts of a succeeded job's student from its report, so that the file need not be inspected."""
    report = job.result or {}
    student, dataset = _student(job), report["dataset"]
    preprocessing = student.get("preprocessing") or {}
    return ModelFacts(
        architecture=student["architecture"],
        num_classes=dataset["num_classes"],
        channels=dataset["channels"],
        parameters=report["student"]["parameters"],
        bytes=size,
        format="safetensors",
        mean=preprocessing.get("mean"),
        std=preprocessing.get("std"),
        class_names=dataset.get("class_names") or None,
        image_size=dataset.get("image_size"),
        digest=f"sha256:{digest}",
    )


def as_colour(data: Target[DatasetFacts]) -> Target[DatasetFacts]:
    """Return grey images read with three equal channels. Images whose channels were chosen are left as they are."""
    if data.facts is None or data.facts.channels != 1 or data.options.channels is not None:
        return data
    options = data.options.model_copy(update={"channels": 3})
    return Target(data.facts.with_three_channels(), data.reference, options)


def _registered_options(facts: DatasetFacts) -> DataOptions:
    """Return the options of a registration. Earlier versions stored only the size that came out of them."""
    options = DataOptions.model_validate(facts.options, context=STORED)
    return options if options.image_size else options.model_copy(update={"image_size": facts.resized_to})


def _same_images(options: DataOptions, registered: DataOptions, facts: DatasetFacts) -> bool:
    """Return True if a registered data set, read with these options, has the facts of its registration."""
    wanted, own = options.deciding(), registered.deciding()
    sizes = wanted.pop("image_size", None), own.pop("image_size", None)
    as_registered = sizes[0] in (None, sizes[1]) or facts.image_size == (sizes[0], sizes[0])
    return wanted == own and as_registered


def _named(name: str, options: DataOptions, size_at: str = "/dataset/image_size") -> DatasetFacts:
    dataset, size = DATASETS[name], options.image_size
    if size is not None and not dataset.resizable and dataset.image_size != (size, size):
        native = dataset.image_size
        text = f"the images of {name} have one size, {native[0]} x {native[1]}"
        raise ReferenceFault(text, "not_allowed", native[0], size, pointer=size_at)
    for field, value in options.deciding().items():
        if field in _OF_FILES:
            text = f"{field} is for data sets of your own, not for the built-in {name}"
            raise ReferenceFault(text, "not_allowed", None, value, pointer=f"/dataset/{field}")
    facts = named_facts(name, size)
    if options.channels == 3 and facts.channels == 1:
        facts = facts.with_three_channels()
    if options.channels == 1 and facts.channels == 3:
        text = f"the mean and std of {name} in grey are not known; only grey images can get other channels here"
        raise ReferenceFault(text, "not_allowed", 3, 1, pointer="/dataset/channels")
    if options.limit is not None and options.limit < facts.num_classes:
        text = f"{name} has {facts.num_classes} classes, and each needs an image"
        at_least = f"≥ {facts.num_classes}"
        raise ReferenceFault(text, "not_allowed", at_least, options.limit, pointer="/dataset/limit")
    return facts.model_copy(update={"train": min(facts.train, options.limit or facts.train)})


def _unknown(kind: str, name: str, known: Iterable[str]) -> ReferenceFault:
    names = sorted(known)
    compared = names if len(names) <= COMPARED else [one for one in names if one[:1] == name[:1]][:COMPARED]
    near = difflib.get_close_matches(name, compared, n=3, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ReferenceFault(f"there is no {kind} {name!r}{hint}", allowed=near or names[:20] or None, got=name)


def _with_hint(refused: Refused) -> str:
    return refused.message + (f" ({refused.hint})" if refused.hint else "")
