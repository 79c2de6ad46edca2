"""A job's attempts: the worker and device of each, its first and last step, and how it ended."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from api.dependencies import Caller, Db
from api.problems import NotFound, responses
from api.schemas import AttemptView, Page, page
from store import attempts, jobs
from store.attempts import Attempt

router = APIRouter(prefix="/v1/jobs/{job_id}/attempts", tags=["jobs"])


@router.get("", response_model=Page[AttemptView], responses=responses(NotFound))
async def listing(job_id: str, caller: Caller, db: Db) -> Response:
    """Every attempt at the job, oldest first. Each has a log of its own: `/logs?attempt=` takes its `attempt`."""

    def read(connection: Connection) -> Sequence[Attempt]:
        jobs.get(connection, job_id, project=caller.project)
        return attempts.list_attempts(connection, job_id)

    return page([AttemptView.of(attempt) for attempt in await db.read(read)])
