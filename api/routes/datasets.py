"""Data sets: the built-in ones by name, and uploaded ones that an inspection has read completely."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.dependencies import Caller, Db, InspectionsDep
from api.problems import NameTaken, NotFound, StorageFull, Unusable, WarningRefused, responses
from api.routes.models import accepted, uploaded
from api.schemas import DatasetView, Json, NewDataset, Page, dataset_view, page
from kdcore.catalog import DATASETS, named_facts
from kdcore.spec import dataset_warnings
from store import errors, registry
from store.records import PageQuery
from store.registry import NewEntry

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


@router.post(
    "",
    status_code=201,
    response_model=DatasetView,
    responses=responses(NotFound, NameTaken, Unusable, WarningRefused, StorageFull),
)
async def register(new: NewDataset, caller: Caller, db: Db, inspections: InspectionsDep) -> Response:
    """Register an uploaded data set: `.npz` arrays, or an archive of images in folders of splits and classes.

    `facts` say what was read as what: layout, splits, images of each class. What is left out is also a warning.

    Arrays of `x` alone, and images outside class folders, have no labels (`labelled: false`): a student can be
    distilled onto them, but not measured on them.

    A separate process reads every row first; the answer names the file or row that cannot be used.
    """
    digest = await uploaded(new.blob, inspections)
    facts = await inspections.dataset(digest, new)
    facts = facts.model_copy(update={"options": new.given()})
    warnings = accepted(dataset_warnings(facts, options=new), new.strict)
    entry = NewEntry(caller.project, new.name, digest, facts.model_dump(mode="json"), warnings)
    dataset = await db.write(registry.datasets.register, entry)
    return Json(dataset_view(dataset), 201, {"Location": f"/v1/datasets/{dataset.id}"})


@router.get("", response_model=Page[DatasetView])
async def listing(caller: Caller, db: Db, query: Annotated[PageQuery, Query()]) -> Response:
    """Registered data sets, newest first. The built-in ones, which have no id, follow on the last page."""
    rows, following = await db.read(registry.datasets.list_page, caller.project, query)
    built_in = [] if following else [_built_in(name) for name in sorted(DATASETS)]
    return page([*(dataset_view(dataset) for dataset in rows), *built_in], following)


@router.get("/{name_or_id}", response_model=DatasetView, responses=responses(NotFound))
async def one(name_or_id: str, caller: Caller, db: Db) -> Response:
    """A data set, by name or id. A registered name hides a built-in one."""
    try:
        return Json(dataset_view(await db.read(registry.datasets.get, caller.project, name_or_id)))
    except errors.NotFound:
        if name_or_id in DATASETS:
            return Json(_built_in(name_or_id))
        raise


@router.delete("/{name_or_id}", status_code=204, responses=responses(NotFound))
async def delete(name_or_id: str, caller: Caller, db: Db) -> Response:
    """Delete a data set. Jobs that were accepted with it name its bytes by digest and are not affected."""
    await db.write(registry.datasets.delete, caller.project, name_or_id)
    return Response(status_code=204)


def _built_in(name: str) -> dict[str, Any]:
    facts = named_facts(name).model_dump(mode="json")
    return {"id": None, "name": name, "blob": None, "facts": facts, "warnings": [], "created_at": None}
