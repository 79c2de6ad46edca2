"""Jobs: send one, look at it, steer it. Facts that forbid a request are 409s that name what are allowed."""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic_core import from_json, to_json
from sqlalchemy import Connection
from starlette.responses import Response

from api.answers import Json, page
from api.auth import Who
from api.database import Db, Files, Setup
from api.inspections import Seen
from api.problems import (
    ActionNotAllowed,
    IdempotencyConflict,
    MalformedBody,
    NotFound,
    Problem,
    SpecInvalid,
    StorageFull,
    TooLarge,
    count,
    not_json,
    responses,
)
from api.references import Shelves
from api.schemas import JobView, Page, Retry, ValidationView, job_view
from api.submission import Examined, estimate, examine
from base.failpoints import failpoint
from base.jobs import Status
from store import jobs, workers
from store.records import Job, NewJob

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}


async def body(request: Request) -> Any:
    """The JSON as it was sent: the spec's own reader names what is wrong with it, all at once."""
    try:
        return from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise not_json(str(error)) from None


async def shelves(db: Db, seen: Seen, who: Who) -> Shelves:
    return Shelves(db, seen, who)


async def bell(request: Request) -> Callable[[], None]:
    ring: Callable[[], None] = request.app.state.ring
    return ring


Body = Annotated[Any, Depends(body)]
Search = Annotated[Shelves, Depends(shelves)]
Ring = Annotated[Callable[[], None], Depends(bell)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=200)]


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses=responses(MalformedBody, TooLarge, SpecInvalid, IdempotencyConflict, StorageFull),
    openapi_extra=SPEC_BODY,
)
async def submit(
    *, sent: Body, search: Search, who: Who, db: Db, ring: Ring, setup: Setup, idempotency_key: Key = None
) -> Response:
    """Send a job. Every fault of the spec comes back at once; an accepted spec is frozen.

    With an `Idempotency-Key`, sending the same body again answers 200 with the same job and the header
    `Idempotent-Replayed: true`; another body under that key is refused.
    """
    digest = hashlib.sha256(to_json(sent)).hexdigest()
    # A replay is answered before it is examined: what the spec names may be gone by now, the job is not.
    if idempotency_key and (known := await db.read(_known, who.project, idempotency_key, digest, setup.lease_s)):
        return _replayed(known)
    examined = await examine(sent, search)
    if examined.resolved is None:
        raise refusal(examined)
    scheduling = examined.resolved.scheduling
    new = NewJob(
        project=who.project,
        name=examined.resolved.name,
        method=examined.resolved.method_name,
        spec=sent,
        resolved_spec=examined.resolved.as_json(),
        spec_sha256=digest,
        idempotency_key=idempotency_key,
        priority=scheduling.priority,
        max_attempts=scheduling.max_attempts or setup.max_attempts,
        deadline_s=scheduling.deadline_s,
    )
    told, created = await db.write(_submit, new, setup.lease_s)
    failpoint("submit.committed")
    ring()
    return _sent(told) if created else _replayed(told)


@router.post(
    "/validate",
    response_model=ValidationView,
    responses=responses(MalformedBody, TooLarge),
    openapi_extra=SPEC_BODY,
)
async def validate(sent: Body, search: Search) -> Response:
    """What `POST /v1/jobs` would say to this spec, without sending it; with the resolved spec and an estimate."""
    examined = await examine(sent, search)
    return Json(
        {
            "valid": examined.resolved is not None,
            "errors": [fault.as_dict() for fault in examined.faults],
            "resolved_spec": examined.resolved.as_json() if examined.resolved else None,
            "estimate": estimate(examined),
        }
    )


@router.get("", response_model=Page[JobView])
async def listing(
    *,
    who: Who,
    db: Db,
    setup: Setup,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=100, description="`next` of the page before.")] = None,
    status: Status | None = None,
    method: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """Jobs, newest first."""
    return await db.read(
        _listing, setup.lease_s, project=who.project, limit=limit, after=after, status=status, method=method
    )


@router.get("/{job_id}", response_model=JobView, responses=responses(NotFound))
async def one(job_id: str, who: Who, db: Db, setup: Setup) -> Response:
    """A job as it stands. Cheap to ask again and again; `/events/stream` says when to."""
    return Json(await db.read(_found, job_id, who.project, setup.lease_s))


@router.post("/{job_id}/cancel", response_model=JobView, responses=responses(NotFound, ActionNotAllowed))
async def cancel(job_id: str, who: Who, db: Db) -> Response:
    """Ask for a job to be stopped. A queued or paused job is cancelled at once.

    A running one is asked: it becomes `cancelled` when its process has really ended, or `succeeded` if it was
    publishing already. Asking twice is asking once.
    """
    job = await db.write(jobs.cancel, job_id, project=who.project)
    return Json(job_view(job))


@router.post("/{job_id}/pause", response_model=JobView, responses=responses(NotFound, ActionNotAllowed))
async def pause(job_id: str, who: Who, db: Db) -> Response:
    """Ask for a job to be set aside. A running one saves its state first, and goes on from there when resumed."""
    job = await db.write(jobs.pause, job_id, project=who.project)
    return Json(job_view(job))


@router.post("/{job_id}/resume", response_model=JobView, responses=responses(NotFound, ActionNotAllowed))
async def resume(job_id: str, who: Who, db: Db, ring: Ring, setup: Setup) -> Response:
    """Put a paused job back into the queue."""
    told = await db.write(_move, jobs.resume, setup.lease_s, job_id, project=who.project)
    ring()
    return Json(told)


@router.post("/{job_id}/retry", response_model=JobView, responses=responses(MalformedBody, NotFound, ActionNotAllowed))
async def retry(*, job_id: str, who: Who, db: Db, ring: Ring, setup: Setup, sent: Retry | None = None) -> Response:
    """Queue a failed or cancelled job again, with its attempts and its deadline given back.

    It goes on from its last checkpoint; with `{"from": "scratch"}` it begins anew.
    """
    from_scratch = sent is not None and sent.start == "scratch"
    told = await db.write(_move, jobs.retry, setup.lease_s, job_id, project=who.project, from_scratch=from_scratch)
    ring()
    return Json(told)


@router.delete("/{job_id}", status_code=204, responses=responses(NotFound, ActionNotAllowed))
async def delete(job_id: str, who: Who, db: Db, files: Files) -> Response:
    """Forget a job that has ended: its events, metrics, artifacts, checkpoints and logs."""
    await db.write(jobs.delete, job_id, project=who.project)
    await to_thread.run_sync(files.delete_job_files, job_id)
    return Response(status_code=204)


def _sent(told: dict[str, Any]) -> Response:
    return Json(told, 201, {"Location": f"/v1/jobs/{told['id']}"})


def _replayed(told: dict[str, Any]) -> Response:
    return Json(told, 200, {"Location": f"/v1/jobs/{told['id']}", "Idempotent-Replayed": "true"})


def refusal(examined: Examined) -> Problem:
    return SpecInvalid(count(examined.faults), examined.faults)


# Each is one transaction: an outage between the move and the look at it would answer 503 to a move that was made.


def _submit(connection: Connection, new: NewJob, lease_s: float) -> tuple[dict[str, Any], bool]:
    job, created = jobs.submit(connection, new)
    return _view(connection, job, lease_s), created


def _move(
    connection: Connection, /, move: Callable[..., Job], lease_s: float, job_id: str, **how: Any
) -> dict[str, Any]:
    return _view(connection, move(connection, job_id, **how), lease_s)


def _known(
    connection: Connection, project: str, idempotency_key: str, digest: str, lease_s: float
) -> dict[str, Any] | None:
    job = jobs.find_by_key(connection, project, idempotency_key, digest)
    return None if job is None else _view(connection, job, lease_s)


def _view(connection: Connection, job: Job, lease_s: float) -> dict[str, Any]:
    return _views(connection, [job], lease_s)[0]


def _views(connection: Connection, found: list[Job], lease_s: float) -> list[dict[str, Any]]:
    waits = workers.waiting_reasons(connection, found, lease_s)
    return [job_view(job, waits.get(job.id)) for job in found]


def _found(connection: Connection, job_id: str, project: str, lease_s: float) -> dict[str, Any]:
    return _view(connection, jobs.get(connection, job_id, project=project), lease_s)


def _listing(
    connection: Connection,
    lease_s: float,
    *,
    project: str,
    limit: int,
    after: str | None,
    status: str | None,
    method: str | None,
) -> Json:
    found, following = jobs.list_jobs(
        connection, project=project, limit=limit, after=after, status=status, method=method
    )
    return page(_views(connection, found, lease_s), following)
