"""What is on the disk, and the collector on request."""

from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.auth import Member
from api.dependencies import Caller, Config, Db, Files, OperatorCaller
from api.problems import StorageFull, responses
from api.schemas import Json, view_of
from base.wire import CollectionView, StorageView
from store import cache, collections, usage
from store.collections import Removed
from store.collector import Collector, Retention, collect
from store.database import Database
from store.file_store import FileStore
from store.settings import Settings

router = APIRouter(prefix="/v1/storage", tags=["service"])

_one_at_a_time = CapacityLimiter(1)
"""A second request of this process waits for the first one, and then has less to do."""


@router.get("", response_model=StorageView)
async def storage(
    *,
    caller: Caller,
    db: Db,
    files: Files,
    settings: Config,
    limit: Annotated[int, Query(ge=0, le=collections.MAX_ROWS, description="The number of collections to list.")] = 10,
) -> Response:
    """What the project uses of the disk, by kind, and the free disk space. For the operator also what is used by all
    projects together (every file is counted, which is slow if there are many), and the newest collections.

    `cache` is the one of the server's own host.
    """
    of_project = await to_thread.run_sync(usage.of_project, db, files, caller.project)
    of_all: dict[str, Any] = {}
    newest: list[Any] = []
    if _sees_all(caller):
        of_all = await to_thread.run_sync(usage.of_all, files, settings.home / "cache")
        newest = [view_of(CollectionView, row) for row in await db.read(collections.list_collections, limit)]
    return Json(
        {
            "project": of_project,
            "usage": of_all,
            "free_bytes": await to_thread.run_sync(files.free_bytes),
            "min_free_bytes": settings.min_free_bytes,
            "collections": newest,
        }
    )


@router.post("/collections", status_code=201, response_model=CollectionView, responses=responses(StorageFull))
async def collect_now(caller: OperatorCaller, db: Db, files: Files, settings: Config) -> Response:
    """Delete now what nothing needs any more, and answer when that is done: the files of deleted jobs and models,
    expired checkpoints and uploads. The collector does so by itself, but waits for a day or two before each deletion.

    Nothing is deleted that a job, a model or a data set names, or that a request in progress is about to name.
    """
    await to_thread.run_sync(_collect, db, files, settings, limiter=_one_at_a_time)
    newest = await db.read(_newest)
    return Json(view_of(CollectionView, newest), 201)


def _sees_all(caller: Member) -> bool:
    return caller.role == "operator"


def _collect(db: Database, files: FileStore, settings: Settings) -> Removed:
    collector = Collector(db, files, Retention.of(settings), on_demand=True)
    collect(collector, every_s=0)
    cache.trim(settings.home / "cache", settings.cache_max_bytes)
    return collector.removed


def _newest(connection: Connection) -> collections.Collection:
    return collections.list_collections(connection, 1)[0]
