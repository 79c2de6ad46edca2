"""A job's attempts: the worker and device of each, its first and last step, and how it ended."""

from fastapi import APIRouter
from starlette.responses import Response

from api.dependencies import Caller, Db
from api.problems import NotFound, responses
from api.schemas import Id, Page, attempt_view, page
from base.wire import AttemptView
from store import attempts, jobs

router = APIRouter(prefix="/v1/jobs/{job_id}/attempts", tags=["jobs"])


@router.get("", response_model=Page[AttemptView], responses=responses(NotFound))
async def listing(job_id: Id, caller: Caller, db: Db) -> Response:
    """Every attempt at the job, oldest first. Each has a log of its own: `/logs?attempt=` takes its `attempt`."""
    rows = await db.read(jobs.read_of_job, job_id, caller.project, attempts.list_attempts)
    return page([attempt_view(attempt) for attempt in rows])
