"""Registered teachers: checkpoints that were inspected first, so that no job fails because of what is in the file."""

from collections.abc import Iterable
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.audit import Auditor
from api.dependencies import AuditDep, Caller, Db, LimiterDep, ReferencesDep, RegistrationsDep
from api.inspections import NOT_UPLOADED, Inspections, OnProgress
from api.limits import Limiter
from api.openapi import headers, made_once
from api.problems import (
    IdempotencyConflict,
    InspectionsBusy,
    NameTaken,
    NotFound,
    StorageFull,
    TooManyInspections,
    Unusable,
    WarningRefused,
    responses,
    summary,
)
from api.references import References, has_blob
from api.registrations import E, Inspected, Kind, Made, New
from api.routes.jobs import Key
from api.schemas import (
    Json,
    ListedModelView,
    MeasuredModelView,
    ModelView,
    NameOrId,
    NewModel,
    Page,
    Relabel,
    measured_view,
    model_view,
    page,
)
from base.errors import Fault
from base.warning import WarningItem, warning_faults
from kdcore.catalog import ModelFacts, ProgramFacts, UnknownName, architecture, libraries
from kdcore.catalog.architectures import hidden_layers
from kdcore.spec import model_warnings
from store import jobs, registry
from store.database import Database
from store.idempotency import Once
from store.registry import Entry, EntryQuery

router = APIRouter(prefix="/v1/models", tags=["models"])


STILL_INSPECTING = "The row is made, and its file is still being inspected: GET it until its `state` is another one."


def answers_of(view: Any) -> dict[int | str, dict[str, Any]]:
    """Return the answers to a registration, for the OpenAPI document."""
    inspecting = {"model": view, "description": STILL_INSPECTING, **headers("Location", "Idempotent-Replayed")}
    problems = responses(
        NotFound,
        NameTaken,
        Unusable,
        WarningRefused,
        IdempotencyConflict,
        TooManyInspections,
        InspectionsBusy,
        StorageFull,
    )
    return {**made_once(view), 202: inspecting, **problems}


async def inspected(new: NewModel, digest: str, inspections: Inspections, on_progress: OnProgress) -> Inspected:
    """Return what is found in a file that is registered. Raises Refused, Unusable or WarningRefused."""
    given = {"architecture": new.architecture, "part": new.part, "averaged": new.averaged}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    facts = await inspections.inspect(ModelFacts, digest, on_progress=on_progress, **options)
    if isinstance(facts, ProgramFacts) and options:
        text = f"the file is {facts.kind}, which holds its own network"
        faults = [Fault(f"/{name}", text, "unused", "leave it out", value) for name, value in options.items()]
        raise Unusable(text, faults)
    facts = _as_stated(facts, new)
    warnings = accepted(model_warnings(facts), new.strict)
    return Inspected(facts.model_dump(mode="json"), warnings)


KIND = Kind(registry.models, NewModel, ModelFacts, inspected)


@router.post(
    "",
    status_code=201,
    response_model=ModelView,
    responses=answers_of(ModelView),
)
async def register(
    *,
    new: NewModel,
    caller: Caller,
    db: Db,
    references: ReferencesDep,
    registrations: RegistrationsDep,
    limiter: LimiterDep,
    audit: AuditDep,
    idempotency_key: Key = None,
) -> Response:
    """Register an uploaded checkpoint or program as a teacher. Its bytes say which of them it is.

    A separate process first reads its classes and images and checks that it fits the architecture. A file
    that cannot be used is not registered, and the answer has the reason.

    If that takes longer than a few seconds, the answer is 202 with `state` `inspecting`; GET the model until it is
    `ready`, or `refused` with the reason. DELETE cancels it. A replay under an `Idempotency-Key` is answered with 200.
    """
    made = await registration(KIND, new, caller.project, idempotency_key, limiter, audit)
    model = await replay(KIND, db, made)
    if model is None:
        if new.architecture is not None:
            await to_thread.run_sync(_require_known, new.architecture)
        digest = await uploaded(new.blob, references)
        asker = references.inspections.asker
        model = await registrations.register(KIND, new, caller.project, digest, made, asker)
    return registered(model_view(model), f"/v1/models/{model.id}", made)


async def registration(
    kind: Kind[E], new: New, project: str, key: str | None, limiter: Limiter, audit: Auditor
) -> Made[E]:
    """Return how a request makes its row: once, within the project's limits, and with an entry of the audit log."""
    table, action = kind.registry.table.name, f"{kind.registry.table.name.removesuffix('s')}.register"

    def note(connection: Connection, entry: Entry) -> None:
        audit.append(connection, action, entry.id, name=entry.name)

    once = Once.of(project, key, table, new.model_dump(mode="json", exclude_unset=True))
    return Made(once, (await limiter.of(project)).inspections, note)


async def replay(kind: Kind[E], db: Database, made: Made[E]) -> E | None:
    """Return the row that this request has made before. A replay checks nothing: the upload may be deleted by now."""
    if made.once is None:
        return None
    entry = await db.read(kind.registry.find_once, made.once)
    made.before = entry is not None
    return entry


def registered(view: dict[str, Any], location: str, made: Made[Any]) -> Response:
    """Return the answer to a registration: 201, 200 if it was made before, or 202 while the file is inspected."""
    headers = {"Location": location}
    if made.before:
        headers["Idempotent-Replayed"] = "true"
    return Json(view, 202 if view["state"] == "inspecting" else 200 if made.before else 201, headers)


@router.get("", response_model=Page[ListedModelView])
async def listing(caller: Caller, db: Db, query: Annotated[EntryQuery, Query()]) -> Response:
    """Registered models, newest first. Without `view=full` their facts are those that a list shows."""
    rows, following = await db.scan(registry.models.list_page, caller.project, query)
    return page([model_view(model) for model in rows], following)


@router.get("/{name_or_id}", response_model=MeasuredModelView, responses=responses(NotFound))
async def one(name_or_id: NameOrId, caller: Caller, db: Db) -> Response:
    """A model, by name or id, with its accuracy on the data sets on which it was evaluated."""

    def read(connection: Connection) -> Response:
        model = registry.models.get(connection, caller.project, name_or_id)
        evaluations = jobs.newest_evaluations(connection, caller.project, model.sha256)
        return Json({**model_view(model), "measured": [measured_view(job) for job in evaluations]})

    return await db.scan(read)


@router.patch("/{name_or_id}", response_model=ModelView, responses=responses(NotFound))
async def relabel(name_or_id: NameOrId, sent: Relabel, caller: Caller, db: Db) -> Response:
    """Replace the labels of a model."""
    return Json(model_view(await db.write(registry.models.relabel, caller.project, name_or_id, sent.labels)))


@router.delete("/{name_or_id}", status_code=204, responses=responses(NotFound))
async def delete(name_or_id: NameOrId, caller: Caller, audit: AuditDep, registrations: RegistrationsDep) -> Response:
    """Delete a model, or cancel its inspection. Jobs that were accepted with it name its bytes by digest and are not
    affected."""
    deleted = await audit.write("model.delete", str, registry.models.delete, caller.project, name_or_id)
    registrations.cancel(deleted)
    return Response(status_code=204)


def accepted(warnings: Iterable[WarningItem], strict: bool) -> list[dict[str, Any]]:
    """Return the warnings of a registration as they are stored. Raises WarningRefused for any if it is strict."""
    found = list(warnings)
    if strict and found:
        faults = warning_faults(found)
        raise WarningRefused(summary(faults), faults)
    return [warning.as_dict() for warning in found]


async def uploaded(blob: str, references: References) -> str:
    """Return the digest of bytes that the project has. Raises NotFound."""
    digest = blob.removeprefix("sha256:")
    if not await has_blob(references.db, references.inspections, references.caller, digest):
        raise NotFound(NOT_UPLOADED, blob=blob)
    return digest


def _require_known(name: str) -> None:
    near: list[str] | None = None
    try:
        text = libraries.missing(hidden_layers(name)[0]) if architecture(name).source == "timm" else None
    except UnknownName as unknown:
        text, near = str(unknown), getattr(unknown, "nearest", None)
    if text is not None:
        raise Unusable(text, [Fault("/architecture", text, "not_allowed", near, name)])


def _as_stated(facts: ModelFacts, new: NewModel) -> ModelFacts:
    """Return the facts with what the client states about the model. Raises Unusable if it does not fit the file."""
    stated: dict[str, Any] = {}
    faults: list[Fault] = []
    if new.preprocessing is not None:
        for name, values in (("mean", new.preprocessing.mean), ("std", new.preprocessing.std)):
            stated[name] = list(values)
            if len(values) != facts.channels:
                text = f"one number for each of the model's {facts.channels} channels"
                faults.append(Fault(f"/preprocessing/{name}", text, "not_allowed", facts.channels, len(values)))
    if new.class_names is not None:
        stated["class_names"] = list(new.class_names)
        if len(new.class_names) != facts.num_classes:
            text = f"one name for each of the model's {facts.num_classes} classes, in the order of its outputs"
            faults.append(Fault("/class_names", text, "not_allowed", facts.num_classes, len(new.class_names)))
    if new.image_size is not None:
        stated["image_size"] = (new.image_size, new.image_size)
        if isinstance(facts, ProgramFacts) and not facts.takes(stated["image_size"]):
            own = list(facts.image_size)
            text = f"{facts.kind} takes the images for which it was exported"
            faults.append(Fault("/image_size", text, "not_allowed", own, new.image_size))
    if faults:
        raise Unusable(summary(faults), faults)
    return facts.model_copy(update=stated)
