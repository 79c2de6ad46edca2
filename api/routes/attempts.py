"""A job's attempts: who tried, on what, from which step to which, and how it ended."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from api.answers import page
from api.auth import Who
from api.database import Db
from api.problems import NotFound, responses
from api.schemas import AttemptView, Page, attempt_view
from store import attempts, jobs
from store.attempts import Attempt

router = APIRouter(prefix="/v1/jobs/{job_id}/attempts", tags=["jobs"])


@router.get("", response_model=Page[AttemptView], responses=responses(NotFound))
async def listing(job_id: str, who: Who, db: Db) -> Response:
    """Every claim of the job, oldest first. Each has a log of its own: `/logs?attempt=` takes its `attempt`."""
    return page([attempt_view(attempt) for attempt in await db.read(_tried, job_id, who.project)])


def _tried(connection: Connection, job_id: str, project: str) -> Sequence[Attempt]:
    return attempts.list_attempts(connection, jobs.get(connection, job_id, project=project).id)
