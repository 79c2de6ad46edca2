"""What the engine can do: each method, what it matches, what it needs, and its options as a schema."""

from typing import Any, get_args

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from api.answers import Json, page
from api.auth import Who
from api.problems import NotFound, responses
from api.schemas import Page
from kdcore.catalog import METHODS, MethodFacts
from kdcore.spec import Method

router = APIRouter(prefix="/v1/methods", tags=["catalogue"])


class MethodView(MethodFacts):
    options: dict[str, Any]
    """JSON schema of the object that stands for the method in a spec."""


def _models() -> dict[str, type[BaseModel]]:
    union = get_args(Method)[0]
    members = get_args(union) or (union,)
    return {member.model_fields["name"].default: member for member in members}


OPTIONS = {name: model.model_json_schema() for name, model in _models().items()}


@router.get("", response_model=Page[MethodView])
async def listing(who: Who) -> Response:
    """Every method, by name."""
    return page([_view(facts) for _, facts in sorted(METHODS.items())])


@router.get("/{name}", response_model=MethodView, responses=responses(NotFound))
async def one(name: str, who: Who) -> Response:
    """A method: paper, what it matches, what it needs, its options with their defaults."""
    if name not in METHODS:
        raise NotFound(f"there is no method {name!r}", allowed=sorted(METHODS))
    return Json(_view(METHODS[name]))


def _view(facts: MethodFacts) -> dict[str, Any]:
    return {**facts.model_dump(mode="json"), "options": OPTIONS[facts.name]}
