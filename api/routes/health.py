"""Is the process up, can it do its work, and how much is there to do."""

import logging
import shutil

from anyio import to_thread
from fastapi import APIRouter
from starlette.responses import Response
from store.database import try_write

from api.answers import Json
from api.database import Db, Setup
from api.problems import StorageFull, Unavailable, responses

log = logging.getLogger("distillery.api")

router = APIRouter(tags=["service"])


@router.get("/healthz")
async def healthz() -> Response:
    """The process answers. Says nothing of the database: restarting us would not mend it."""
    return Json({"status": "ok"})


@router.get("/readyz", responses=responses(Unavailable, StorageFull))
async def readyz(db: Db, setup: Setup) -> Response:
    """A write went through and there is room for files: jobs can be accepted."""
    await db.write(try_write)
    usage = await to_thread.run_sync(shutil.disk_usage, setup.files)
    if usage.free < setup.min_free_bytes:
        raise StorageFull(f"{usage.free} bytes are free, {setup.min_free_bytes} are needed")
    return Json({"status": "ready"})
