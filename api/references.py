"""What a spec names, looked up: a data set, a teacher, a baseline. What is not found is a fault of the answer."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from api.auth import Member
from api.inspections import Inspections
from api.inspector import Refused
from base.errors import Fault
from base.references import DIGEST
from kdcore.catalog import DATASETS, ArchitectureFacts, DatasetFacts, ModelFacts, architecture, named_facts
from kdcore.spec import Dataset, JobSpec, Student, Teacher
from store import artifacts, datasets, jobs, models
from store.database import Database
from store.errors import NotFound
from store.jobs import Job

STUDENT_FILE = "student.safetensors"

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """What a reference means: its facts where they can be known, and the reference that a resolved spec holds."""

    facts: T | None
    reference: str


class Faulty(Exception):
    """A reference that leads nowhere."""

    def __init__(
        self, message: str, code: str = "not_found", allowed: Any = None, got: Any = None, pointer: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.allowed, self.got, self.pointer = message, code, allowed, got, pointer

    def at(self, pointer: str) -> Fault:
        """The fault at the reference itself, unless another field of the spec is to blame."""
        return Fault(self.pointer or pointer, self.message, self.code, self.allowed, self.got)


@dataclass(frozen=True)
class Shelves:
    """Where things that a spec may name are kept, as one member sees them."""

    db: Database
    inspections: Inspections
    who: Member

    async def dataset(self, asked: Dataset, size_at: str = "/dataset/image_size") -> Found[DatasetFacts]:
        """`size_at` points to what is to blame where the images cannot have the size that is asked for."""
        source = asked.source
        if source.startswith("file:"):
            raise Faulty(
                "the service opens no files by path; upload the data and register it", "not_allowed", got=source
            )
        if source.startswith("blob:"):
            digest = await self._digest(source)
            return Found(await self._inspected_dataset(digest, asked.image_size), source)
        try:
            registered = await self.db.read(datasets.get, self.who.project, source)
        except NotFound:
            # A registered name stands before a built-in one: without internet, your own cifar100 is the one you mean.
            if source in DATASETS:
                return Found(_named(source, asked.image_size, size_at), source)
            registered_names = [
                row.name for row in (await self.db.read(datasets.list_page, self.who.project, limit=100))[0]
            ]
            raise _unknown("data set", source, [*DATASETS, *registered_names]) from None
        facts = DatasetFacts.model_validate(registered.facts)
        if asked.image_size is not None and facts.image_size != (asked.image_size, asked.image_size):
            facts = await self._inspected_dataset(registered.sha256, asked.image_size)
        return Found(facts, f"blob:sha256:{registered.sha256}")

    async def teacher(self, asked: Teacher) -> Found[ModelFacts]:
        if asked.program is not None:
            return await self._uploaded_program(asked.program)
        reference = asked.checkpoint or ""
        kind, _, name = reference.partition(":")
        match kind:
            case "model":
                return await self._registered_model(name)
            case "job":
                return await self._student_of(name)
            case "blob":
                return await self._uploaded_model(reference, asked.architecture)
            case "weights":
                return Found(None, reference)
        raise Faulty("the service opens no files by path; upload the weights", "not_allowed", got=reference)

    async def baseline(self, reference: str, data: Found[DatasetFacts] | None, student: Student | None) -> Found[Job]:
        """A job that measured the same student on the same data."""
        kind, _, name = reference.partition(":")
        if kind != "job":
            raise Faulty("a baseline is an earlier job's student", "not_allowed", "job:<id>", reference)
        job = await self._job(name)
        if job.status != "succeeded":
            raise Faulty(f"job {job.id} is {job.status}: it has no measured student", "not_ready", got=job.status)
        theirs = _student(job)["architecture"]
        if student is not None and theirs != student.architecture:
            raise Faulty(
                f"job {job.id} trained a {theirs}, not the same student", "not_allowed", student.architecture, theirs
            )
        source = job.resolved_spec["dataset"]["source"]
        if data is not None and source != data.reference:
            raise Faulty(f"job {job.id} learned from other data", "not_allowed", data.reference, source)
        file = await self.db.read(artifacts.get, job.id, STUDENT_FILE)
        return Found(job, f"blob:sha256:{file.sha256}")

    async def network(self, name: str, data: DatasetFacts) -> Found[ArchitectureFacts]:
        """A network of timm's is known only by building it."""
        facts = architecture(name)
        if facts.source == "timm":
            seen = await self.inspections.architecture(name, data)
            if isinstance(seen, Refused):
                raise Faulty(_told(seen), _code(seen), got=name)
            facts = seen
        return Found(facts, name)

    async def taps(self, name: str, paths: tuple[str, ...], data: DatasetFacts) -> Found[dict[str, list[int]]]:
        """The shape of each tap of a network, without the batch."""
        seen = await self.inspections.taps(name, paths, data)
        if isinstance(seen, Refused):
            raise Faulty(_told(seen), _code(seen), got=", ".join(paths))
        return Found(seen, name)

    async def _registered_model(self, name: str) -> Found[ModelFacts]:
        try:
            model = await self.db.read(models.get, self.who.project, name)
        except NotFound:
            known = [row.name for row in (await self.db.read(models.list_page, self.who.project, limit=100))[0]]
            raise _unknown("model", name, known) from None
        return Found(ModelFacts.model_validate(model.facts), f"blob:sha256:{model.sha256}")

    async def _student_of(self, job_id: str) -> Found[ModelFacts]:
        job = await self._job(job_id)
        if job.status != "succeeded" or job.result is None:
            raise Faulty(
                f"job {job_id} is {job.status}: only a succeeded job's student can teach", "not_ready", got=job.status
            )
        if _members(job) > 1:
            text = f"job {job_id} delivered an ensemble of {_members(job)} networks; one of them can teach, not all"
            raise Faulty(text, "not_allowed", got=f"job:{job_id}")
        file = await self.db.read(artifacts.get, job_id, STUDENT_FILE)
        return Found(student_facts(job, file.sha256, file.bytes), f"blob:sha256:{file.sha256}")

    async def _uploaded_model(self, reference: str, named: str | None) -> Found[ModelFacts]:
        digest = await self._digest(reference)
        if named is None:
            return Found(None, reference)
        seen = await self.inspections.model(digest, named)
        if isinstance(seen, Refused):
            raise Faulty(_told(seen), seen.code)
        return Found(seen, reference)

    async def _uploaded_program(self, reference: str) -> Found[ModelFacts]:
        if not reference.startswith("blob:"):
            raise Faulty("the service opens no files by path; upload the program", "not_allowed", got=reference)
        seen = await self.inspections.program(await self._digest(reference))
        if isinstance(seen, Refused):
            raise Faulty(_told(seen), seen.code)
        return Found(seen, reference)

    async def _inspected_dataset(self, digest: str, image_size: int | None) -> DatasetFacts:
        seen = await self.inspections.dataset(digest, image_size)
        if isinstance(seen, Refused):
            raise Faulty(_told(seen), seen.code)
        return seen

    async def _digest(self, reference: str) -> str:
        """The hex digest of `blob:sha256:<hex>`, once it is known that we have those bytes."""
        named = reference.removeprefix("blob:")
        if not DIGEST.fullmatch(named):
            raise Faulty("a blob is named sha256: and 64 hexadecimal digits", "not_allowed", got=reference)
        digest = named.removeprefix("sha256:")
        if not await self.inspections.has(digest):
            raise Faulty("these bytes have not been uploaded; POST them to /v1/uploads first", got=reference)
        return digest

    async def _job(self, job_id: str) -> Job:
        try:
            return await self.db.read(jobs.get, job_id, project=self.who.project)
        except NotFound:
            raise Faulty(f"there is no job {job_id!r}", got=f"job:{job_id}") from None


def _student(job: Job) -> dict[str, Any]:
    """The student that a job is about: the first, where several taught each other."""
    student = job.resolved_spec["student"]
    first: dict[str, Any] = student[0] if isinstance(student, list) else student
    return first


def _members(job: Job) -> int:
    """How many networks a job's file holds: all generations, where their ensemble was asked for."""
    scheme = JobSpec.model_validate(job.resolved_spec).scheme
    return scheme.generations if scheme.ensemble_is_result else 1


def student_facts(job: Job, digest: str, size: int) -> ModelFacts:
    """What a succeeded job's report says of its own student: nothing need be opened again."""
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
        digest=f"sha256:{digest}",
    )


def _named(name: str, image_size: int | None, size_at: str) -> DatasetFacts:
    native = DATASETS[name].image_size
    if image_size is not None and not DATASETS[name].resizable and native != (image_size, image_size):
        text = f"the images of {name} have one size, {native[0]} x {native[1]}"
        raise Faulty(text, "not_allowed", native[0], image_size, pointer=size_at)
    return named_facts(name, image_size)


def _unknown(kind: str, name: str, known: Iterable[str]) -> Faulty:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return Faulty(f"there is no {kind} {name!r}{hint}", allowed=near or names[:20] or None, got=name)


def _code(refused: Refused) -> str:
    """A verdict about a network is the spec's fault; one about us (a timeout) says so."""
    return "not_allowed" if refused.final else refused.code


def _told(refused: Refused) -> str:
    return refused.message + (f" ({refused.hint})" if refused.hint else "")
