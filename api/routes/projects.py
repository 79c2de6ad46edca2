"""Projects: the operator makes and deletes them. A project's keys see its own rows and nothing else."""

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.dependencies import AuditDep, Auth, Db, OperatorCaller
from api.openapi import made_once
from api.problems import IdempotencyConflict, NameTaken, NotFound, ProjectNotEmpty, RoleForbidden, responses
from api.routes.jobs import Key
from api.schemas import Id, Json, NewProject, Page, page, view_of
from base.wire import ProjectView
from store import idempotency, projects
from store.idempotency import Once
from store.projects import Project
from store.records import PageQuery

router = APIRouter(prefix="/v1/projects", tags=["projects"])


@router.post(
    "",
    status_code=201,
    response_model=ProjectView,
    responses={**made_once(ProjectView), **responses(NotFound, NameTaken, RoleForbidden, IdempotencyConflict)},
)
async def create(
    new: NewProject, caller: OperatorCaller, db: Db, audit: AuditDep, idempotency_key: Key = None
) -> Response:
    """Make a project. Its first key is made with `POST /v1/keys` and `project`."""
    once = Once.of(caller.project, idempotency_key, "projects", new.model_dump(mode="json", exclude_unset=True))

    def write(connection: Connection) -> tuple[Project, bool]:
        if (known := idempotency.reserve(connection, once, new.name)) is not None:
            return projects.get(connection, known), False
        audit.append(connection, "project.create", new.name, project=new.name)
        return projects.create(connection, new.name), True

    project, created = await db.write(write)
    headers = {"Location": f"/v1/projects/{project.name}"}
    if created:
        return Json(view_of(ProjectView, project), 201, headers)
    return Json(view_of(ProjectView, project), 200, {**headers, "Idempotent-Replayed": "true"})


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
async def delete(name: Id, caller: OperatorCaller, db: Db, auth: Auth, audit: AuditDep) -> Response:
    """Delete a project that has no jobs, models, data sets and uploads, and end its keys.

    Its name is not given again.
    """

    def write(connection: Connection) -> None:
        projects.remove(connection, name)
        audit.append(connection, "project.delete", name, project=name)

    await db.write(write)
    auth.forget()
    return Response(status_code=204)
