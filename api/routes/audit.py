"""The audit log, for admins of a project and the operator. Nothing changes or deletes an entry by a request."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.responses import Response

from api.dependencies import AdminCaller, Db
from api.schemas import Page, page, view_of
from base.wire import AuditView
from store import audit
from store.audit import AuditQuery
from store.database import Database

router = APIRouter(prefix="/v1/audit", tags=["audit"])


@router.get("", response_model=Page[AuditView])
async def listing(caller: AdminCaller, db: Db, query: Annotated[AuditQuery, Query()]) -> Response:
    """Who did what to which resource, newest first. An admin sees the own project, the operator all of them.

    Requests that were refused for an unknown key have no project; of many of these, some are written and the others
    counted, in `details.left_out` of the next.
    """
    project = None if caller.role == "operator" else caller.project
    rows, following = await to_thread.run_sync(_read, db, project, query)
    return page([view_of(AuditView, row) for row in rows], following)


def _read(db: Database, project: str | None, query: AuditQuery) -> tuple[list[audit.Entry], str | None]:
    """Read a page. A filter may have to look at many entries, so this runs in a thread."""
    with db.connect() as connection:
        return audit.list_page(connection, project, query)
