"""The state of the service for its operator: health, numbers for Prometheus, workers, storage."""

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from sqlalchemy import Connection, text
from starlette.responses import PlainTextResponse, Response

from api.dependencies import Caller, Config, Db, Files, OperatorCaller
from api.problems import Unauthorized, Unavailable, responses
from api.schemas import Json, Page, page, view_of, worker_view
from base.errors import DatabaseUnavailable, StorageFull
from base.wire import CollectionView, HealthView, StorageView, WorkerView
from store import collections, jobs, teachers, workers
from store.database import Database
from store.file_store import FileStore, usage

probes = APIRouter(tags=["service"])
router = APIRouter(prefix="/v1", tags=["service"])

READY_S = 3.0
"""Time limit of /readyz: load balancers wait less time than clients."""
REMEMBERED_S = 1.0
"""The time for which /readyz stays ready: whoever asks needs no key, and each try is a durable write."""


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
async def prometheus(caller: OperatorCaller, db: Db, settings: Config) -> PlainTextResponse:
    """For the operator: jobs by status and the number of working workers, in the text format of Prometheus."""
    lines = await db.read(_prometheus_lines, settings.lease_s)
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/workers", response_model=Page[WorkerView])
async def listing(caller: Caller, db: Db, settings: Config) -> Response:
    """Workers and their slots. A worker that was killed is listed for a day, as not `alive`. `job` and `current_job`
    are null for a job of another project, which only the operator sees."""
    project = None if caller.is_at_least("operator") else caller.project
    return page([worker_view(worker, settings.lease_s) for worker in await db.read(workers.list_workers, project)])


@router.get("/storage", response_model=StorageView)
async def storage(
    *,
    caller: OperatorCaller,
    db: Db,
    files: Files,
    settings: Config,
    limit: Annotated[int, Query(ge=0, le=collections.MAX_ROWS, description="The number of collections to list.")] = 10,
) -> Response:
    """For the operator: files and bytes by kind, the free disk space, and the newest collections.

    Every file is counted, which is slow if there are many. `cache` is the one of the server's own host.
    """
    newest = await db.read(collections.list_collections, limit)
    return Json(
        {
            "usage": await to_thread.run_sync(usage, files, settings.home / "cache"),
            "free_bytes": await to_thread.run_sync(files.free_bytes),
            "min_free_bytes": settings.min_free_bytes,
            "collections": [view_of(CollectionView, collection) for collection in newest],
        }
    )


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


def _prometheus_lines(connection: Connection, lease_s: float) -> list[str]:
    by_status = {f'{{status="{name}"}}': n for name, n in sorted(jobs.count_by_status(connection).items())}
    for_teachers = {"": teachers.count_waiting(connection)}
    working = {"": len(workers.list_consuming(connection, lease_s))}
    return [
        *_gauge("distillery_jobs", "Jobs by status.", by_status),
        *_gauge("distillery_jobs_waiting_for_teacher", "Queued jobs that no worker can start yet.", for_teachers),
        *_gauge("distillery_workers", "Workers that take jobs.", working),
    ]


def _gauge(name: str, meaning: str, values: dict[str, Any]) -> Iterator[str]:
    yield f"# HELP {name} {meaning}"
    yield f"# TYPE {name} gauge"
    for labels, value in values.items():
        yield f"{name}{labels} {value}"
