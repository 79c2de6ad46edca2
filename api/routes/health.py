"""Is the process up, can it do its work, and how much is there to do."""

from anyio import to_thread
from fastapi import APIRouter
from sqlalchemy import Connection, text
from starlette.responses import Response

from api.answers import Json
from api.database import Db, Files, Setup
from api.problems import StorageFull, Unavailable, responses

router = APIRouter(tags=["service"])


@router.get("/healthz")
async def healthz() -> Response:
    """The process answers. Says nothing of the database: restarting us would not mend it."""
    return Json({"status": "ok"})


@router.get("/readyz", responses=responses(Unavailable, StorageFull))
async def readyz(db: Db, files: Files, setup: Setup) -> Response:
    """A write went through and there is room for files: jobs can be accepted."""
    await db.write(_try_write)
    free = await to_thread.run_sync(files.free_bytes)
    if free < setup.min_free_bytes:
        raise StorageFull(f"{free} bytes are free, {setup.min_free_bytes} are needed")
    return Json({"status": "ready"})


def _try_write(connection: Connection) -> None:
    """Touches a page and changes nothing: a read-only disk shows, and so does a schema that was never made."""
    connection.execute(text("UPDATE alembic_version SET version_num = version_num"))
