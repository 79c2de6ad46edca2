"""Benchmarks: the size and the speed of networks on this service's machines, measured once and kept."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.dependencies import AuditDep, Caller, Config, Db, LimiterDep, ReferencesDep, WakeWorkers
from api.openapi import headers
from api.problems import (
    IdempotencyConflict,
    InspectionsBusy,
    MalformedBody,
    NotFound,
    QuotaExceeded,
    SpecInvalid,
    StorageFull,
    TooManyInspections,
    responses,
    summary,
)
from api.references import ReferenceFault, References
from api.routes.jobs import Key, new_job
from api.schemas import Json, NewBenchmark, Page, benchmark_view, page
from base.errors import Fault
from base.failpoints import failpoint
from base.references import BLOB
from base.wire import BenchmarkView
from kdcore.catalog import ArchitectureFacts, DatasetFacts, ModelFacts, ProgramFacts
from kdcore.spec import BenchmarkSpec, Teacher
from kdcore.spec.measured import benchmark_key
from store import jobs, speeds
from store.errors import NotFound as NoRow
from store.idempotency import Once, digest_of
from store.records import PageQuery

router = APIRouter(prefix="/v1/benchmarks", tags=["benchmarks"])

CLASSES, CHANNELS = 10, 3
"""Of an architecture, where the request does not say them."""
BenchmarkKey = Annotated[str, Path(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}$")]
KEPT = {
    "model": BenchmarkView,
    "description": "Measured before, or being measured by an earlier request; or the `Idempotency-Key` is known.",
    **headers("Location", "Idempotent-Replayed"),
}


@router.post(
    "",
    status_code=201,
    response_model=BenchmarkView,
    responses={
        200: KEPT,
        201: headers("Location"),
        **responses(
            MalformedBody,
            SpecInvalid,
            IdempotencyConflict,
            QuotaExceeded,
            TooManyInspections,
            InspectionsBusy,
            StorageFull,
        ),
    },
)
async def submit(
    *,
    sent: NewBenchmark,
    references: ReferencesDep,
    caller: Caller,
    db: Db,
    wake_workers: WakeWorkers,
    settings: Config,
    limiter: LimiterDep,
    audit: AuditDep,
    idempotency_key: Key = None,
) -> Response:
    """Measure parameters, size, multiplications and latency (p50, p95) of one network, with one image and with a batch.

    The figures are kept under a digest of all that decides them: a second request for the same is answered with 200 and
    these figures, unless it has `"anew": true`. Otherwise a job of the kind `benchmark` measures them on a worker: its
    id is `job`, and the figures are at `/v1/benchmarks/{key}` when it has succeeded. On a machine that does other work
    meanwhile latencies are larger.
    """
    spec = sent.model_dump(mode="json", exclude_unset=True)
    digest = digest_of("jobs", spec)
    once = None if idempotency_key is None else Once(caller.project, idempotency_key, "jobs", digest)
    if once is not None and (known := await db.read(_replayed, once)) is not None:
        return _answer(known, replayed=True)
    asked = await _resolved(sent, references)
    if faults := asked.metric_faults():
        raise SpecInvalid(summary(faults), faults)
    new = new_job(asked, spec, digest, idempotency_key, caller, settings)
    bounds, room = await limiter.of(new.project), await limiter.room(new.project)

    def write(connection: Connection) -> tuple[dict[str, Any], str]:
        kept = speeds.get(connection, caller.project, asked.key)
        if kept is not None and not sent.anew:
            return benchmark_view(asked.key, kept, None), "kept"
        if (open_job := speeds.benchmark_job(connection, caller.project, asked.key, open_only=True)) is not None:
            return benchmark_view(asked.key, kept, open_job), "kept"
        job, created = jobs.submit(connection, new, bounds.jobs_queued, room)
        if created:
            audit.append(connection, "benchmark.submit", job.id, name=job.name)
        return benchmark_view(asked.key, kept, job), "created" if created else "replayed"

    view, how = await db.write(write)
    if how != "created":
        return _answer(view, replayed=how == "replayed")
    failpoint("submit.committed")
    wake_workers()
    return Json(view, 201, {"Location": f"/v1/benchmarks/{asked.key}"})


@router.get("", response_model=Page[BenchmarkView])
async def listing(caller: Caller, db: Db, query: Annotated[PageQuery, Query()]) -> Response:
    """The benchmarks that are kept, the newest first."""

    def read(connection: Connection) -> Response:
        found = speeds.newest(connection, caller.project, "benchmark", query.limit + 1, query.after)
        shown = found[: query.limit]
        views = [
            benchmark_view(row.key, row, speeds.benchmark_job(connection, caller.project, row.key)) for row in shown
        ]
        return page(views, shown[-1].key if len(found) > query.limit else None)

    return await db.scan(read)


@router.get("/{key}", response_model=BenchmarkView, responses=responses(NotFound))
async def one(key: BenchmarkKey, caller: Caller, db: Db) -> Response:
    """A benchmark: its figures, if they are measured, and the state of its newest job."""

    def read(connection: Connection) -> Response:
        kept = speeds.get(connection, caller.project, key)
        job = speeds.benchmark_job(connection, caller.project, key)
        if job is None and kept is None:
            raise NoRow("benchmark", key)
        return Json(benchmark_view(key, kept, job))

    return await db.read(read)


def _replayed(connection: Connection, once: Once) -> dict[str, Any] | None:
    job = jobs.find_once(connection, once)
    if job is None or job.kind != "benchmark":
        return None
    key = job.resolved_spec["key"]
    return benchmark_view(key, speeds.get(connection, once.project, key), job)


def _answer(view: dict[str, Any], *, replayed: bool) -> Response:
    more = {"Idempotent-Replayed": "true"} if replayed else {}
    return Json(view, 200, {"Location": f"/v1/benchmarks/{view['key']}", **more})


async def _resolved(sent: NewBenchmark, references: References) -> BenchmarkSpec:
    """Return what is measured, with its key. Raises SpecInvalid that names the field at fault."""
    named = [field for field in ("architecture", "model", "job") if getattr(sent, field) is not None]
    if len(named) != 1:
        text = "name one network: an architecture, a registered model, or the job of a student"
        raise _invalid(Fault(f"/{named[1]}" if named else "", text, "not_allowed", ["architecture", "model", "job"]))
    (field,) = named
    network: dict[str, Any] = {"architecture": sent.architecture, "weights": None}
    shape = {"num_classes": sent.num_classes or CLASSES, "channels": sent.channels or CHANNELS}
    size: tuple[int | None, int | None] = (sent.image_size, sent.image_size)
    try:
        if field != "architecture":
            reference = f"{field}:{getattr(sent, field)}"
            target = await references.teacher(Teacher(checkpoint=reference))
            if not target.reference.startswith(BLOB):
                raise ReferenceFault("the job has not succeeded: it has no student yet", "not_ready")
            facts = target.facts
            assert facts is not None, "a registered file has facts"  # noqa: S101
            is_program = isinstance(facts, ProgramFacts)
            network = {"architecture": None if is_program else facts.architecture, "weights": target.reference}
            if faults := _other_shape(sent, facts):
                raise SpecInvalid(summary(faults), faults)
            shape = {"num_classes": facts.num_classes, "channels": facts.channels}
            size = size if sent.image_size else facts.image_size or (None, None)
    except ReferenceFault as fault:
        raise _invalid(fault.at(f"/{field}")) from None
    height, width = size
    if height is None or width is None:
        text = "the size of the images is needed, since the latency depends on it"
        raise _invalid(Fault("/image_size", text, "missing", "4 to 1024"))
    if network["architecture"] is not None and field == "architecture":
        await _require_fitting(sent, (height, width), shape, references)
    body = {
        **network,
        **shape,
        "image_size": [height, width],
        "batch_size": sent.batch_size,
        "device": sent.device,
        "threads": sent.threads,
        "export": list(sent.export),
    }
    people = {"name": sent.name, "labels": sent.labels, "job": sent.job, "model": sent.model}
    key = benchmark_key(body, {"torch": _torch_version()})
    return BenchmarkSpec(**{**body, **people, "key": key, "scheduling": sent.scheduling})


def _invalid(fault: Fault) -> SpecInvalid:
    return SpecInvalid(summary([fault]), [fault])


def _other_shape(sent: NewBenchmark, facts: ModelFacts) -> list[Fault]:
    """Return the faults of what was asked of a file that has its own number of classes and channels."""
    return [
        Fault(f"/{name}", f"the file has its own {name}: leave it out", "unused", own, given)
        for name, own in (("num_classes", facts.num_classes), ("channels", facts.channels))
        if (given := getattr(sent, name)) not in (None, own)
    ]


async def _require_fitting(
    sent: NewBenchmark, size: tuple[int, int], shape: dict[str, int], references: References
) -> None:
    """Raise SpecInvalid for a listed network that does not take such images."""
    assert sent.architecture is not None, "only a listed network is checked"  # noqa: S101
    seen = DatasetFacts(
        kind="arrays",
        num_classes=shape["num_classes"],
        class_names=[],
        channels=shape["channels"],
        image_size=size,
        train=0,
        test=0,
        mean=[0.5] * shape["channels"],
        std=[0.5] * shape["channels"],
    )
    try:
        facts: ArchitectureFacts | None = (await references.network(sent.architecture, seen)).facts
    except ReferenceFault as fault:
        raise _invalid(fault.at("/architecture")) from None
    if facts is None:
        return
    if facts.channels not in ("any", shape["channels"]):
        text = f"{facts.name} takes images of {facts.channels} channels"
        raise _invalid(Fault("/channels", text, "not_allowed", facts.channels, shape["channels"]))
    if size[0] < facts.min_image or (facts.max_image is not None and size[0] > facts.max_image):
        most = "" if facts.max_image is None else f", at most {facts.max_image}"
        text = f"{facts.name} takes images of at least {facts.min_image} pixels{most}"
        raise _invalid(Fault("/image_size", text, "not_allowed", facts.min_image, size[0]))


def _torch_version() -> str:
    """Return the version of PyTorch beside this server, which is that of the workers of one installation."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "unknown"
