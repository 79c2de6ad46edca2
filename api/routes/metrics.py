"""A job's curves: what was measured while it trained."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.answers import Json
from api.auth import Who
from api.database import Db
from api.problems import NotFound, responses
from api.schemas import MetricsView
from store import jobs, metrics

router = APIRouter(prefix="/v1/jobs/{job_id}/metrics", tags=["jobs"])


@router.get("", response_model=MetricsView, responses=responses(NotFound))
async def series(
    *,
    job_id: str,
    who: Who,
    db: Db,
    keys: Annotated[
        str | None, Query(max_length=1000, description="Names with commas between; all, if left out.")
    ] = None,
    after_step: Annotated[
        int | None, Query(ge=0, description="Only later steps; each trial counts its own from 0.")
    ] = None,
    max_points: Annotated[int, Query(ge=2, le=10_000, description="Of each curve; peaks and valleys are kept.")] = 500,
) -> Response:
    """Each curve by trial (`student`, `alone`) and key, such as `validation/accuracy`, as [step, value] points."""
    wanted = [key for key in keys.split(",") if key] if keys else None
    return Json(await db.read(_series, job_id, who.project, keys=wanted, after_step=after_step, max_points=max_points))


def _series(
    connection: Connection,
    job_id: str,
    project: str,
    *,
    keys: list[str] | None,
    after_step: int | None,
    max_points: int,
) -> dict[str, Any]:
    jobs.get(connection, job_id, project=project)
    return {"series": metrics.series(connection, job_id, keys, after_step, max_points)}
