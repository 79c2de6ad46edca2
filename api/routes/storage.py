"""How much is kept, how much room there is, and what the collector removed lately."""

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.responses import Response

from api.answers import Json, iso
from api.auth import Who
from api.database import Db, Files, Setup
from api.schemas import StorageView
from store import collections
from store.collections import Collection
from store.file_store import FileStore, usage
from store.settings import Settings

router = APIRouter(prefix="/v1/storage", tags=["service"])


@router.get("", response_model=StorageView)
async def storage(
    *,
    who: Who,
    db: Db,
    files: Files,
    setup: Setup,
    limit: Annotated[int, Query(ge=0, le=collections.MAX_ROWS, description="Collections to tell of.")] = 10,
) -> Response:
    """Files and bytes by kind, the room that is left, and the newest collections.

    It looks at every file, which takes a while where there are many. `cache` is that of the server's own host.
    """
    kept = await to_thread.run_sync(_kept, files, setup)
    lately = await db.read(collections.list_collections, limit)
    return Json({**kept, "collections": [_collection_view(one) for one in lately]})


def _kept(files: FileStore, setup: Settings) -> dict[str, Any]:
    kinds = usage(files, setup.home / "cache")
    return {
        "usage": {kind: vars(used) for kind, used in kinds.items()},
        "free_bytes": files.free_bytes(),
        "min_free_bytes": setup.min_free_bytes,
    }


def _collection_view(collection: Collection) -> dict[str, Any]:
    times = {"began_at": iso(collection.began_at), "ended_at": iso(collection.ended_at)}
    return {**vars(collection), **times}
