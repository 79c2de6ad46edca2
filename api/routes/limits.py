"""The limits of a project and what of them is used; the operator sets them."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import Connection
from starlette.responses import Response

from api.dependencies import AuditDep, Caller, Db, LimiterDep, OperatorCaller
from api.problems import NotFound, responses
from api.schemas import Filter, Json, NameOrId, Schema
from base.wire import LimitsView
from store import errors, limits
from store.limits import Limits

router = APIRouter(tags=["limits"])


class Changes(Schema):
    """What changes of a project."""

    limits: Limits = Field(description="The limits that change. Null: the default holds again.")


@router.get("/v1/limits", response_model=LimitsView, responses=responses(NotFound))
async def one(
    caller: Caller,
    limiter: LimiterDep,
    project: Annotated[Filter | None, Query(description="Another project, for the operator.")] = None,
) -> Response:
    """The limits of the caller's project, and what is used. Those of one API process are of the one that answers."""
    if project is None or project == caller.project:
        return await _view(caller.project, limiter)
    if caller.role != "operator":
        raise errors.NotFound("project", project)
    return await _view(project, limiter)


@router.patch("/v1/projects/{name}", response_model=LimitsView, responses=responses(NotFound))
async def change(
    name: NameOrId, changes: Changes, caller: OperatorCaller, db: Db, limiter: LimiterDep, audit: AuditDep
) -> Response:
    """Set limits of a project. Other API processes have them within 5 s, workers at their next claim.

    A limit below what is used now ends nothing: it refuses what comes next.
    """
    sent = changes.limits.model_dump(exclude_unset=True)

    def write(connection: Connection) -> None:
        limits.set_own(connection, name, sent)
        audit.append(connection, "project.change", name, project=name, limits=sent)

    await db.write(write)
    limiter.forget(name)
    return await _view(name, limiter)


async def _view(project: str, limiter: LimiterDep) -> Response:
    return Json({"project": project, "limits": await limiter.usage(project)})
