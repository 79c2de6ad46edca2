"""A job's curves: the values measured while it trained."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from api.dependencies import Caller, Db
from api.problems import NotFound, responses
from api.schemas import Count, Id, Json, Line
from base.wire import MetricsView
from store import jobs, metrics

router = APIRouter(prefix="/v1/jobs/{job_id}/metrics", tags=["jobs"])


@router.get("", response_model=MetricsView, responses=responses(NotFound))
async def series(
    *,
    job_id: Id,
    caller: Caller,
    db: Db,
    keys: Annotated[Line | None, Query(description="Names separated by commas; default: all.")] = None,
    after_step: Annotated[
        Count | None, Query(description="Only later steps; each trial counts its own from 0.")
    ] = None,
    max_points: Annotated[int, Query(ge=2, le=10_000, description="Per curve; minima and maxima are kept.")] = 500,
) -> Response:
    """Each curve by trial (`student`, `alone`) and key, such as `validation/accuracy`, as [step, value] points."""
    names = [key for key in keys.split(",") if key] if keys else None
    curves = await db.stream(jobs.read_of_job, job_id, caller.project, metrics.series, names, after_step, max_points)
    return Json({"series": curves})
