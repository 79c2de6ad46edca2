"""Is the process up, can it do its work, and how much is there to do."""

import asyncio
import os

from anyio import to_thread
from fastapi import APIRouter
from sqlalchemy import Connection, text
from starlette.responses import Response

from api.answers import Json
from api.database import Db, Files, Setup
from api.problems import Unavailable, not_now, responses
from base.errors import StorageFull as NoSpaceLeft
from store.file_store import FileStore

router = APIRouter(tags=["service"])

READY_S = 3.0
"""Whoever asks whether we are ready will not wait as long as a request does."""


@router.get("/healthz")
async def healthz() -> Response:
    """The process answers. Says nothing of the database: restarting us would not mend it."""
    return Json({"status": "ok"})


@router.get("/readyz", responses=responses(Unavailable))
async def readyz(db: Db, files: Files, setup: Setup) -> Response:
    """Jobs can be accepted and started: a write went through in time, and there is room for files."""
    try:
        async with asyncio.timeout(READY_S):
            await db.write(_try_write)
            fault = await to_thread.run_sync(_files_fault, files, setup.min_free_bytes, abandon_on_cancel=True)
    except TimeoutError:
        fault = f"no write went through within {READY_S:g} s"
    except NoSpaceLeft as error:
        fault = str(error)
    if fault is not None:
        raise not_now(fault)
    return Json({"status": "ready"})


def _try_write(connection: Connection) -> None:
    """Touches a page and changes nothing: a read-only disk shows, and so does a schema that was never made."""
    connection.execute(text("UPDATE alembic_version SET version_num = version_num"))


def _files_fault(files: FileStore, min_free_bytes: int) -> str | None:
    """Why no file could be kept, if none could. A job is accepted all the same, and waits for room."""
    try:
        free = files.free_bytes()
    except OSError as error:
        return f"no file can be kept: {error}"
    if free < min_free_bytes:
        return f"{free} bytes are free for files, {min_free_bytes} are needed to start a job"
    return None if os.access(files.folder, os.W_OK) else f"no file can be kept: {files.folder} cannot be written to"
