"""Who works: each worker that was heard of lately, its devices and its job."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from api.answers import iso, page
from api.auth import Who
from api.database import Db
from api.schemas import Page, WorkerView
from store import workers
from store.workers import Worker

router = APIRouter(prefix="/v1/workers", tags=["service"])

ALIVE_S = 60.0
"""A worker says that it lives every few seconds; one that has not for so long is gone."""


@router.get("", response_model=Page[WorkerView])
async def listing(who: Who, db: Db) -> Response:
    """Workers and what they are at. `seen_at` is their last sign of life."""
    return page([_view(worker) for worker in await db.read(workers.list, seen_within_s=ALIVE_S)])


def _view(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.id,
        "host": worker.host,
        "devices": worker.devices,
        "current_job": worker.current_job,
        "seen_at": iso(worker.seen_at),
    }
