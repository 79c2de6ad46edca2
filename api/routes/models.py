"""Teachers: checkpoints that an inspection has opened, so that a job cannot fail on what the file really is."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.answers import Json, page
from api.auth import Who
from api.database import Db
from api.inspections import Seen
from api.inspector import Refused
from api.problems import NameTaken, NotFound, StorageFull, Unusable, responses
from api.schemas import ModelView, NewModel, Page, PreprocessingView, model_view
from base.errors import Fault
from kdcore.catalog import ModelFacts, UnknownName, architecture
from store import registry

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.post(
    "", status_code=201, response_model=ModelView, responses=responses(NotFound, NameTaken, Unusable, StorageFull)
)
async def register(asked: NewModel, who: Who, db: Db, seen: Seen) -> Response:
    """Register an uploaded checkpoint as a teacher.

    It is opened first, in a process of its own: does it fit the architecture, how many classes does it tell apart,
    what images does it take. A file that fails is not registered, and the answer says what is wrong with it.
    """
    digest = asked.blob.removeprefix("sha256:")
    if asked.architecture is not None:
        _known(asked.architecture)
    if not await seen.has(digest):
        raise NotFound("these bytes have not been uploaded; POST them to /v1/uploads first", blob=asked.blob)
    facts = await seen.model(digest, asked.architecture)
    if isinstance(facts, Refused):
        raise refused(facts, "/blob")
    told = _normalised(facts, asked.preprocessing)
    model = await db.write(registry.models.register, who.project, asked.name, digest, told.model_dump(mode="json"))
    return Json(model_view(model), 201, {"Location": f"/v1/models/{model.id}"})


@router.get("", response_model=Page[ModelView])
async def listing(
    who: Who,
    db: Db,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=100, description="`next` of the page before.")] = None,
) -> Response:
    """Registered models, newest first."""
    found, following = await db.read(registry.models.list_page, who.project, limit=limit, after=after)
    return page([model_view(model) for model in found], following)


@router.get("/{name_or_id}", response_model=ModelView, responses=responses(NotFound))
async def one(name_or_id: str, who: Who, db: Db) -> Response:
    """A model, by name or id."""
    return Json(model_view(await db.read(registry.models.get, who.project, name_or_id)))


@router.delete("/{name_or_id}", status_code=204, responses=responses(NotFound))
async def delete(name_or_id: str, who: Who, db: Db) -> Response:
    """Forget a model. Jobs that were accepted with it hold its bytes by digest and are not disturbed."""
    await db.write(registry.models.delete, who.project, name_or_id)
    return Response(status_code=204)


def refused(why: Refused, pointer: str) -> Unusable:
    fault = Fault(pointer, why.message, why.code)
    return Unusable(why.message, [fault], hint=why.hint)


def _known(name: str) -> None:
    try:
        architecture(name)
    except UnknownName as unknown:
        fault = Fault("/architecture", str(unknown), "not_allowed", getattr(unknown, "nearest", None), name)
        raise Unusable(str(unknown), [fault]) from None


def _normalised(facts: ModelFacts, asked: PreprocessingView | None) -> ModelFacts:
    if asked is None:
        return facts
    for name in ("mean", "std"):
        values: list[Any] = getattr(asked, name)
        if len(values) != facts.channels:
            text = f"one number for each of the model's {facts.channels} channels"
            raise Unusable(text, [Fault(f"/preprocessing/{name}", text, "not_allowed", facts.channels, len(values))])
    return facts.model_copy(update={"mean": asked.mean, "std": asked.std})
