"""Projects: the operator makes and deletes them. A project's keys see its own rows and nothing else."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.dependencies import Auth, Db, OperatorCaller
from api.problems import NameTaken, NotFound, ProjectNotEmpty, RoleForbidden, responses
from api.schemas import Id, Json, NewProject, Page, page, view_of
from base.wire import ProjectView
from store import projects
from store.records import PageQuery

router = APIRouter(prefix="/v1/projects", tags=["projects"])


@router.post("", status_code=201, response_model=ProjectView, responses=responses(NameTaken, RoleForbidden))
async def create(new: NewProject, caller: OperatorCaller, db: Db) -> Response:
    """Make a project. Its first key is made with `POST /v1/keys` and `project`."""
    project = await db.write(projects.create, new.name)
    return Json(view_of(ProjectView, project), 201, {"Location": f"/v1/projects/{project.name}"})


@router.get("", response_model=Page[ProjectView], responses=responses(RoleForbidden))
async def listing(caller: OperatorCaller, db: Db, query: Annotated[PageQuery, Query()]) -> Response:
    """Projects by name."""
    rows, following = await db.read(projects.list_page, query.limit, query.after)
    return page([view_of(ProjectView, project) for project in rows], following)


@router.get("/{name}", response_model=ProjectView, responses=responses(NotFound, RoleForbidden))
async def one(name: Id, caller: OperatorCaller, db: Db) -> Response:
    """A project."""
    return Json(view_of(ProjectView, await db.read(projects.get, name)))


@router.delete("/{name}", status_code=204, responses=responses(NotFound, ProjectNotEmpty, RoleForbidden))
async def delete(name: Id, caller: OperatorCaller, db: Db, auth: Auth) -> Response:
    """Delete a project that has no jobs, models, data sets and uploads, with its keys."""
    await db.write(projects.remove, name)
    auth.forget()
    return Response(status_code=204)
