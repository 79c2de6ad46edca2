"""Data sets: the built-in ones by name, and uploaded ones that an inspection has read completely."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import FileResponse, Response

from api.dependencies import AuditDep, Caller, Db, Files, LimiterDep, ReferencesDep, RegistrationsDep
from api.inspections import Inspections, OnProgress
from api.openapi import headers
from api.problems import (
    NotFound,
    NotReady,
    responses,
)
from api.registrations import Inspected, Kind
from api.routes.artifacts import Download
from api.routes.jobs import Key
from api.routes.models import accepted, answers_of, registered, registration, replay, uploaded
from api.schemas import DatasetView, Json, ListedDatasetView, NameOrId, NewDataset, Page, Relabel, dataset_view, page
from kdcore.catalog import DATASETS, DatasetFacts, named_facts
from kdcore.spec import dataset_warnings
from store import errors, registry
from store.lists import facts_summary_of
from store.registry import EntryQuery

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])


async def inspected(new: NewDataset, digest: str, inspections: Inspections, on_progress: OnProgress) -> Inspected:
    """Return what is found in a data set that is registered. Raises Refused or WarningRefused."""
    facts = await inspections.dataset(digest, new, on_progress=on_progress, pictured=True)
    facts = facts.model_copy(update={"options": new.given()})
    warnings = accepted(dataset_warnings(facts, options=new), new.strict)
    return Inspected(facts.model_dump(mode="json"), warnings, {"thumbnails": await inspections.thumbnails(digest, new)})


KIND = Kind(registry.datasets, NewDataset, DatasetFacts, inspected)


@router.post(
    "",
    status_code=201,
    response_model=DatasetView,
    responses=answers_of(DatasetView),
)
async def register(
    *,
    new: NewDataset,
    caller: Caller,
    db: Db,
    references: ReferencesDep,
    registrations: RegistrationsDep,
    limiter: LimiterDep,
    audit: AuditDep,
    idempotency_key: Key = None,
) -> Response:
    """Register an uploaded data set: `.npz` arrays, or an archive of images in folders of splits and classes.

    A separate process reads every row first. If that takes longer than a few seconds, the answer is 202 with `state`
    `inspecting`; GET the data set until it is `ready`, or `refused` with the reason. DELETE cancels it.

    `facts` say what was read as what: layout, splits, images of each class. What is left out is also a warning.

    Arrays of `x` alone, and images outside class folders, have no labels (`labelled: false`): a student can be
    distilled onto them, but not measured on them.
    """
    made = await registration(KIND, new, caller.project, idempotency_key, limiter, audit)
    dataset = await replay(KIND, db, made)
    if dataset is None:
        digest = await uploaded(new.blob, references)
        asker = references.inspections.asker
        dataset = await registrations.register(KIND, new, caller.project, digest, made, asker)
    return registered(dataset_view(dataset), f"/v1/datasets/{dataset.id}", made)


@router.get("", response_model=Page[ListedDatasetView])
async def listing(caller: Caller, db: Db, query: Annotated[EntryQuery, Query()]) -> Response:
    """Registered data sets, newest first. Without `view=full` their facts are those that a list shows.

    The built-in ones, which have neither an id nor labels, follow on the last page.
    """
    rows, following = await db.scan(registry.datasets.list_page, caller.project, query)
    built_in = [] if following else [_listed(_built_in(name), query) for name in _matching(query)]
    return page([*(dataset_view(dataset) for dataset in rows), *built_in], following)


@router.get("/{name_or_id}", response_model=DatasetView, responses=responses(NotFound))
async def one(name_or_id: NameOrId, caller: Caller, db: Db) -> Response:
    """A data set, by name or id. A registered name hides a built-in one."""
    try:
        return Json(dataset_view(await db.read(registry.datasets.get, caller.project, name_or_id)))
    except errors.NotFound:
        if name_or_id in DATASETS:
            return Json(_built_in(name_or_id))
        raise


@router.get(
    "/{name_or_id}/thumbnails",
    response_class=FileResponse,
    responses={
        200: {
            "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
            **headers("Cache-Control", "Content-Disposition", "ETag", "Last-Modified"),
        },
        **responses(NotFound, NotReady),
    },
)
async def thumbnails(name_or_id: NameOrId, caller: Caller, db: Db, files: Files) -> Response:
    """Some training images, evenly over the classes, as one PNG; `thumbnails` of the data set says where each is."""
    dataset = await db.read(registry.datasets.get, caller.project, name_or_id)
    if dataset.state != "ready":
        raise NotReady(f"data set {dataset.name!r} is {dataset.state}")
    if dataset.thumbnails is None:
        raise NotFound(f"data set {dataset.name!r} has no thumbnails: an earlier version of the service registered it")
    digest = dataset.thumbnails["sha256"]
    headers = {"ETag": f'"{digest}"', "Cache-Control": "private, no-cache", "Content-Disposition": "inline"}
    return Download(files.path(digest), dataset.created_at, headers=headers, media_type="image/png")


@router.patch("/{name_or_id}", response_model=DatasetView, responses=responses(NotFound))
async def relabel(name_or_id: NameOrId, sent: Relabel, caller: Caller, db: Db) -> Response:
    """Replace the labels of a registered data set."""
    return Json(dataset_view(await db.write(registry.datasets.relabel, caller.project, name_or_id, sent.labels)))


@router.delete("/{name_or_id}", status_code=204, responses=responses(NotFound))
async def delete(name_or_id: NameOrId, caller: Caller, audit: AuditDep, registrations: RegistrationsDep) -> Response:
    """Delete a data set, or cancel its inspection. Jobs that were accepted with it name its bytes by digest and are not
    affected."""
    deleted = await audit.write("dataset.delete", str, registry.datasets.delete, caller.project, name_or_id)
    registrations.cancel(deleted)
    return Response(status_code=204)


def _matching(query: EntryQuery) -> list[str]:
    """Return the built-in data sets that a query finds."""
    if query.labels or query.state not in (None, "ready"):
        return []
    return [name for name in sorted(DATASETS) if name.startswith(query.name or "")]


def _listed(view: dict[str, Any], query: EntryQuery) -> dict[str, Any]:
    return view if query.view == "full" else {**view, "facts": facts_summary_of(view["facts"])}


def _built_in(name: str) -> dict[str, Any]:
    facts = named_facts(name).model_dump(mode="json")
    ready: dict[str, Any] = {"state": "ready", "progress": None, "error": None, "warnings": [], "thumbnails": None}
    return {"id": None, "name": name, "labels": {}, "blob": None, "facts": facts, "created_at": None, **ready}
