"""Data sets: the built-in ones by name, and uploaded ones that an inspection has read from end to end."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.answers import Json, page
from api.auth import Who
from api.database import Db
from api.inspections import Seen
from api.inspector import Refused
from api.problems import NameTaken, NotFound, StorageFull, Unusable, responses
from api.routes.models import refused
from api.schemas import DatasetView, NewDataset, Page, dataset_view
from kdcore.catalog import DATASETS, named_facts
from store import errors, registry

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


@router.post(
    "", status_code=201, response_model=DatasetView, responses=responses(NotFound, NameTaken, Unusable, StorageFull)
)
async def register(asked: NewDataset, who: Who, db: Db, seen: Seen) -> Response:
    """Register an uploaded data set: `.npz` arrays, or an archive with one folder of pictures a class.

    Arrays of `x` alone, or pictures in no class folder, are images without labels (`labelled: false`): a student can be
    distilled onto them, but not measured on them.

    Every row is read first, in a process of its own; what is wrong is named by file or row.
    """
    digest = asked.blob.removeprefix("sha256:")
    if not await seen.has(digest):
        raise NotFound("these bytes have not been uploaded; POST them to /v1/uploads first", blob=asked.blob)
    facts = await seen.dataset(digest, asked.image_size)
    if isinstance(facts, Refused):
        raise refused(facts, "/blob")
    dataset = await db.write(registry.datasets.register, who.project, asked.name, digest, facts.model_dump(mode="json"))
    return Json(dataset_view(dataset), 201, {"Location": f"/v1/datasets/{dataset.id}"})


@router.get("", response_model=Page[DatasetView])
async def listing(
    who: Who,
    db: Db,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=100, description="`next` of the page before.")] = None,
) -> Response:
    """Registered data sets, newest first; the built-in ones, which have no id, follow the last."""
    found, following = await db.read(registry.datasets.list_page, who.project, limit=limit, after=after)
    built_in = [] if following else [_built_in(name) for name in sorted(DATASETS)]
    return page([*(dataset_view(dataset) for dataset in found), *built_in], following)


@router.get("/{name_or_id}", response_model=DatasetView, responses=responses(NotFound))
async def one(name_or_id: str, who: Who, db: Db) -> Response:
    """A data set, by name or id. A registered name stands before a built-in one."""
    try:
        return Json(dataset_view(await db.read(registry.datasets.get, who.project, name_or_id)))
    except errors.NotFound:
        if name_or_id in DATASETS:
            return Json(_built_in(name_or_id))
        raise


@router.delete("/{name_or_id}", status_code=204, responses=responses(NotFound))
async def delete(name_or_id: str, who: Who, db: Db) -> Response:
    """Forget a data set. Jobs that were accepted with it hold its bytes by digest and are not disturbed."""
    await db.write(registry.datasets.delete, who.project, name_or_id)
    return Response(status_code=204)


def _built_in(name: str) -> dict[str, Any]:
    facts = named_facts(name).model_dump(mode="json")
    return {"id": None, "name": name, "blob": None, "facts": facts, "created_at": None}
