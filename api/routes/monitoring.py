"""The state of the service for its operator: health, numbers for Prometheus, workers."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, text
from starlette.responses import PlainTextResponse, Response

from api.dependencies import Caller, Config, Db, ExchangeDep, Files
from api.problems import Unauthorized, Unavailable, responses
from api.schemas import Json, Page, page, worker_view
from base.errors import DatabaseUnavailable, StorageFull
from base.wire import HealthView, WorkerView
from store import jobs, teachers, workers
from store.database import Database
from store.file_store import FileStore

probes = APIRouter(tags=["service"])
router = APIRouter(prefix="/v1", tags=["service"])

READY_S = 3.0
"""Time limit of /readyz: load balancers wait less time than clients."""
REMEMBERED_S = 1.0
"""The time for which /readyz stays ready: a client needs no key for it, and each try is a durable write."""


@probes.get("/healthz", response_model=HealthView)
async def healthz() -> Response:
    """The process answers. The database is not checked: a restart of this process would not repair it."""
    return Json({"status": "ok"})


@probes.get("/readyz", response_model=HealthView, responses=responses(Unavailable))
async def readyz(request: Request, db: Db, files: Files, settings: Config) -> Response:
    """Jobs can be accepted and started: a write succeeded in time, and there is disk space for files."""
    readiness: Readiness = request.app.state.readiness
    fault = await readiness.fault(db, files, settings.min_free_bytes)
    if fault is not None:
        raise Unavailable(fault)
    return Json({"status": "ready"})


class Readiness:
    """What keeps this process from being ready. Of all who ask at the same time, one tries; a success is remembered."""

    def __init__(self) -> None:
        self._trial: asyncio.Task[str | None] | None = None
        self._ready_until = float("-inf")

    async def fault(self, db: Database, files: FileStore, min_free_bytes: int) -> str | None:
        if time.monotonic() < self._ready_until:
            return None
        if self._trial is None:
            self._trial = asyncio.create_task(self._try(db, files, min_free_bytes))
        # Who goes away does not end the trial for the others.
        return await asyncio.shield(self._trial)

    async def _try(self, db: Database, files: FileStore, min_free_bytes: int) -> str | None:
        try:
            fault = await _fault(db, files, min_free_bytes)
            if fault is None:
                self._ready_until = time.monotonic() + REMEMBERED_S
            return fault
        finally:
            self._trial = None


async def _fault(db: Database, files: FileStore, min_free_bytes: int) -> str | None:
    try:
        async with asyncio.timeout(READY_S):
            await db.write(_try_write)
            return await to_thread.run_sync(_files_fault, files, min_free_bytes, abandon_on_cancel=True)
    except TimeoutError:
        return f"no write succeeded within {READY_S:g} s"
    except StorageFull as error:
        return str(error)
    except DatabaseUnavailable as error:
        return Unavailable.of(error).detail


@probes.get("/metrics", response_class=PlainTextResponse, responses=responses(Unauthorized, Unavailable))
async def prometheus(
    caller: Caller, db: Db, files: Files, settings: Config, exchange: ExchangeDep
) -> PlainTextResponse:
    """Jobs by status and the queue of the key's project, in the text format of Prometheus. For the operator those of
    all projects, and what concerns the service: workers, slots, requests by route, refusals, deliveries, disk space."""
    of_all = caller.role == "operator"
    families = await db.read(_of_jobs, None if of_all else caller.project)
    if of_all:
        families += await db.read(_of_service, settings.lease_s)
        families += await to_thread.run_sync(_of_disk, files, settings.min_free_bytes)
        families += await to_thread.run_sync(list, exchange.collect())
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@router.get("/workers", response_model=Page[WorkerView])
async def listing(caller: Caller, db: Db, settings: Config) -> Response:
    """Workers and their slots. A worker that was killed is listed for a day, as not `alive`. `job` and `current_job`
    are null for a job of another project, which only the operator sees."""
    project = None if caller.is_at_least("operator") else caller.project
    return page([worker_view(worker, settings.lease_s) for worker in await db.read(workers.list_workers, project)])


def _try_write(connection: Connection) -> None:
    """Write without a change. It fails on a read-only disk, and if the tables do not exist."""
    connection.execute(text("UPDATE alembic_version SET version_num = version_num"))


def _files_fault(files: FileStore, min_free_bytes: int) -> str | None:
    """Return the reason why no file can be stored or no job started, or None. Jobs are accepted anyway, and wait."""
    try:
        free = files.free_bytes()
    except OSError as error:
        return f"no file can be stored: {error}"
    if free < min_free_bytes:
        return f"{free} bytes are free for files, {min_free_bytes} are needed to start a job"
    return None if os.access(files.folder, os.W_OK) else f"no file can be stored: {files.folder} cannot be written to"


class _Families(Collector):
    """Figures that are ready, as Prometheus's client wants them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _of_jobs(connection: Connection, project: str | None) -> list[Metric]:
    """Return the figures of the jobs of a project, or of all projects."""
    by_status = {(status,): float(n) for status, n in sorted(jobs.count_by_status(connection, project).items())}
    depth, oldest_s = jobs.queue(connection, project)
    return [
        _gauge("distillery_jobs", "Jobs by status.", ["status"], by_status),
        _gauge("distillery_queue_depth", "Queued jobs that a worker may start now.", [], {(): depth}),
        _gauge("distillery_queue_oldest_seconds", "Time since the oldest of them was submitted.", [], {(): oldest_s}),
    ]


def _of_service(connection: Connection, lease_s: float) -> list[Metric]:
    """Return the figures of the workers, and of jobs that no worker can start."""
    known = [worker for worker in workers.list_workers(connection) if worker.silent_s <= lease_s]
    slots: Counter[tuple[str, ...]] = Counter(
        (device.kind, device.state) for worker in known for device in worker.devices
    )
    memory = {
        (worker.host, worker.id, device.name): float(device.memory_bytes)
        for worker in known
        for device in worker.devices
        if device.memory_bytes is not None
    }
    consuming = sum(worker.consumes(lease_s) for worker in known)
    waiting = teachers.count_waiting(connection)
    return [
        _gauge("distillery_jobs_waiting_for_teacher", "Queued jobs that no worker can start yet.", [], {(): waiting}),
        _gauge("distillery_workers", "Workers that take jobs.", [], {(): consuming}),
        _gauge("distillery_slots", "Slots of workers; busy ones train.", ["device", "state"],
               {slot: float(n) for slot, n in sorted(slots.items())}),
        _gauge("distillery_device_memory_bytes", "Memory of each slot's GPU or host.", ["host", "worker", "device"],
               memory),
    ]  # fmt: skip


def _of_disk(files: FileStore, min_free_bytes: int) -> list[Metric]:
    free = {(): float(files.free_bytes())}
    return [
        _gauge("distillery_free_bytes", "Free disk space for files.", [], free),
        _gauge("distillery_min_free_bytes", "With less, no job and no upload is begun.", [], {(): min_free_bytes}),
    ]


def _gauge(name: str, meaning: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
