"""Who works: each worker that was heard of within a day, its slots, and whether it proves that it takes jobs."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from api.answers import iso, page
from api.auth import Who
from api.database import Db, Setup
from api.schemas import Page, WorkerView
from store import workers
from store.workers import Worker

router = APIRouter(prefix="/v1/workers", tags=["service"])


@router.get("", response_model=Page[WorkerView])
async def listing(who: Who, db: Db, setup: Setup) -> Response:
    """Workers and what their slots are at. One that was killed stays here for a day, not `alive`."""
    return page([_view(worker, setup.lease_s) for worker in await db.read(workers.list_workers)])


def _view(worker: Worker, lease_s: float) -> dict[str, Any]:
    return {
        "id": worker.id,
        "host": worker.host,
        "alive": worker.consumes(lease_s),
        "devices": [vars(device) for device in worker.devices],
        "current_job": worker.current_job,
        "started_at": iso(worker.started_at),
        "seen_at": iso(worker.seen_at),
    }
