"""Jobs: submit, read, and act on them. An action that the job's status does not allow is answered with 409."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from pydantic_core import from_json
from sqlalchemy import Connection
from starlette.responses import Response

from api.audit import Auditor
from api.auth import Member
from api.dependencies import (
    AuditDep,
    Caller,
    Config,
    Db,
    Files,
    LimiterDep,
    PollsDep,
    ReferencesDep,
    WakeWorkers,
)
from api.estimate import estimated
from api.limits import Limiter
from api.openapi import headers, made_once
from api.problems import (
    ActionNotAllowed,
    IdempotencyConflict,
    InspectionsBusy,
    MalformedBody,
    NotFound,
    QuotaExceeded,
    SpecInvalid,
    StorageFull,
    TeacherUnavailable,
    TooLarge,
    TooManyInspections,
    WarningRefused,
    malformed_json,
    responses,
    summary,
)
from api.schemas import Id, Json, Line, Page, Relabel, Retry, Title, job_summary, job_view, page
from api.submission import examine
from base.failpoints import failpoint
from base.warning import WarningItem
from base.wire import JobSummary, JobView, ValidationView
from kdcore.spec import JobSpec, KindSpec
from store import jobs, workers
from store.database import Database
from store.idempotency import Once, digest_of
from store.jobs import JobQuery
from store.records import Job, NewJob
from store.settings import Settings

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/JobSpec"}}},
    }
}


SUBMITTED = made_once(JobView)
"""The answers to a job that is submitted."""


async def body(request: Request) -> Any:
    """Return the JSON as it was sent. The spec's own reader checks it, so that all faults are returned at once."""
    try:
        return from_json(await request.body(), allow_inf_nan=False)
    except ValueError as error:
        raise malformed_json(str(error)) from None


Body = Annotated[Any, Depends(body)]
Probe = Annotated[bool, Query(description="Run a few steps if the cost of the job was never measured.")]
Known = Annotated[Line | None, Header(description="The tag of the answer that you have: 304 if it is still the same.")]
Key = Annotated[Title | None, Header(alias="Idempotency-Key")]


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses={
        **SUBMITTED,
        **responses(
            MalformedBody,
            TooLarge,
            SpecInvalid,
            WarningRefused,
            IdempotencyConflict,
            TeacherUnavailable,
            QuotaExceeded,
            TooManyInspections,
            InspectionsBusy,
            StorageFull,
        ),
    },
    openapi_extra=SPEC_BODY,
)
async def submit(
    *,
    spec: Body,
    references: ReferencesDep,
    caller: Caller,
    db: Db,
    wake_workers: WakeWorkers,
    settings: Config,
    limiter: LimiterDep,
    audit: AuditDep,
    idempotency_key: Key = None,
) -> Response:
    """Submit a job. Every fault of the spec is answered at once; an accepted spec never changes.

    With an `Idempotency-Key`, a second request with the same body is answered with 200, the same job, and the header
    `Idempotent-Replayed: true`; another body under that key is refused. The order of fields does not count, and 1.0
    is 1. A key is remembered for as long as the job exists. All that makes something takes such a key.

    A teacher `job:<id>` may be a job that has not ended: the new job stays `queued` (`waiting`: `teacher`) until that
    job succeeds, and fails with `teacher_unavailable` if it ends otherwise.
    """
    digest = digest_of("jobs", spec)
    if known := await replay(db, settings, caller.project, idempotency_key, digest):
        return known
    # A job does not wait for a probe: only what is measured already can make a warning.
    examined = (await estimated(await examine(spec, references), references, settings, probe=False)).examined
    if examined.resolved is None:
        problem = WarningRefused if examined.is_refused_for_warnings else SpecInvalid
        raise problem(summary(examined.faults), examined.faults)
    new = new_job(examined.resolved, spec, digest, idempotency_key, caller, settings, examined.warnings)
    return await accept(new, db, settings, wake_workers, limiter, audit)


@router.post(
    "/validate",
    response_model=ValidationView,
    responses=responses(MalformedBody, TooLarge, TooManyInspections, InspectionsBusy),
    openapi_extra=SPEC_BODY,
)
async def validate(spec: Body, references: ReferencesDep, settings: Config, probe: Probe = True) -> Response:
    """Check a spec as `POST /v1/jobs` does, without submitting it. Returns its faults, or the resolved spec and an
    estimate.

    The estimate's seconds and memory are those of earlier jobs. Where none has measured them, a probe runs a few steps
    on the server's machine, which takes some seconds; `probe=false` leaves it out.
    """
    result = await estimated(await examine(spec, references), references, settings, probe=probe)
    examined = result.examined
    return Json(
        {
            "valid": examined.resolved is not None,
            "errors": [fault.as_dict() for fault in examined.faults],
            "warnings": [warning.as_dict() for warning in examined.warnings],
            "resolved_spec": examined.resolved.as_json() if examined.resolved else None,
            "estimate": result.estimate if examined.resolved else None,
        }
    )


@router.get("", response_model=Page[JobSummary] | Page[JobView])
async def listing(caller: Caller, db: Db, settings: Config, query: Annotated[JobQuery, Query()]) -> Response:
    """Jobs of all kinds, newest first. Filters combine; `labels` and `status` may be sent several times.

    Without `view=full` a job has the fields that a list shows. To get the next page, send the same filters and `next`
    as `after`.
    """

    def read(connection: Connection) -> Response:
        if query.view == "full":
            whole, following = jobs.list_full_jobs(connection, caller.project, query)
            return page(views(connection, whole, settings.lease_s), following)
        return listed(connection, caller.project, query, settings.lease_s)

    # On SQLite a scan is another thread, which takes far longer than to see that nothing matches.
    if db.is_sqlite and not await db.read(jobs.may_list, caller.project, query):
        return page([])
    return await db.scan(read)


@router.get(
    "/{job_id}",
    response_model=JobView,
    responses={
        200: headers("ETag", "Cache-Control"),
        304: {"description": "The job is as you know it.", **headers("ETag", "Cache-Control")},
        **responses(NotFound),
    },
)
async def one(job_id: Id, caller: Caller, polls: PollsDep, if_none_match: Known = None) -> Response:
    """A job. Polling it is cheap, most of all with the `ETag` of the last answer as `If-None-Match`; `/events/stream`
    shows when it has changed."""
    return (await polls.answer(job_id, caller.project)).response(if_none_match)


@router.post("/{job_id}/cancel", response_model=JobView, responses=responses(NotFound, ActionNotAllowed))
async def cancel(job_id: Id, caller: Caller, audit: AuditDep) -> Response:
    """Cancel a job. A queued or paused job is cancelled immediately.

    A running job is stopped first: its status becomes `cancelled` when its process has ended, or `succeeded` if its
    training had already ended. Cancelling is idempotent.
    """
    return Json(job_view(await audit.write("job.cancel", job_id, jobs.cancel, job_id, project=caller.project)))


@router.post("/{job_id}/pause", response_model=JobView, responses=responses(NotFound, ActionNotAllowed))
async def pause(job_id: Id, caller: Caller, audit: AuditDep) -> Response:
    """Pause a job. A running job saves a checkpoint first and resumes from there. Pausing is idempotent."""
    return Json(job_view(await audit.write("job.pause", job_id, jobs.pause, job_id, project=caller.project)))


@router.post("/{job_id}/resume", response_model=JobView, responses=responses(NotFound, ActionNotAllowed))
async def resume(job_id: Id, caller: Caller, audit: AuditDep, wake_workers: WakeWorkers, settings: Config) -> Response:
    """Return a paused job to the queue."""
    job = await audit.write(
        "job.resume", job_id, _view_of, jobs.resume, settings.lease_s, job_id, project=caller.project
    )
    wake_workers()
    return Json(job)


@router.post(
    "/{job_id}/retry",
    response_model=JobView,
    responses=responses(MalformedBody, NotFound, ActionNotAllowed, TeacherUnavailable),
)
async def retry(
    *,
    job_id: Id,
    caller: Caller,
    audit: AuditDep,
    limiter: LimiterDep,
    wake_workers: WakeWorkers,
    settings: Config,
    sent: Retry | None = None,
) -> Response:
    """Queue a failed or cancelled job again, with all its attempts and its whole deadline.

    It resumes from its newest checkpoint; with `{"from": "scratch"}` it starts from the beginning. A job that failed
    because its teacher's job did not succeed waits for it again; as long as that one has not been retried, too, the
    answer is 409, `teacher_unavailable`.
    """
    scratch = sent is not None and sent.start == "scratch"
    bounds = await limiter.of(caller.project)
    how: dict[str, Any] = {"project": caller.project, "from_scratch": scratch, "max_queued": bounds.jobs_queued}
    job = await audit.write("job.retry", job_id, _view_of, jobs.retry, settings.lease_s, job_id, **how)
    wake_workers()
    return Json(job)


@router.patch("/{job_id}", response_model=JobView, responses=responses(MalformedBody, NotFound))
async def relabel(job_id: Id, sent: Relabel, caller: Caller, db: Db, settings: Config) -> Response:
    """Replace the labels of a job, in any status. Its spec stays as it was sent."""
    return Json(await db.write(_view_of, jobs.relabel, settings.lease_s, job_id, sent.labels, project=caller.project))


@router.delete("/{job_id}", status_code=204, responses=responses(NotFound, ActionNotAllowed))
async def delete(job_id: Id, caller: Caller, audit: AuditDep, files: Files) -> Response:
    """Delete a job that has ended, with its events, metrics, artifacts, checkpoints and logs, and with the jobs that
    took its student, such as exports. While one of these has not ended, the answer is 409."""
    for deleted in await audit.write("job.delete", job_id, jobs.delete, job_id, project=caller.project):
        await to_thread.run_sync(files.delete_job_files, deleted)
    return Response(status_code=204)


def new_job(
    resolved: JobSpec | KindSpec,
    spec: dict[str, Any],
    digest: str,
    key: str | None,
    caller: Member,
    settings: Settings,
    warnings: Iterable[WarningItem] = (),
    **more: Any,
) -> NewJob:
    """Return the job of a resolved spec. `spec`: as it was sent, with its digest. `more`: further fields of the job."""
    return NewJob.of(
        resolved,
        project=caller.project,
        spec=spec,
        spec_sha256=digest,
        idempotency_key=key,
        created_by=caller.key_id,
        created_by_name=caller.key_name,
        max_attempts=resolved.scheduling.max_attempts or settings.max_attempts,
        warnings=[warning.as_dict() for warning in warnings],
        **more,
    )


async def replay(db: Database, settings: Settings, project: str, key: str | None, digest: str) -> Response | None:
    """Return the answer to a request whose key is known. A replay checks nothing: what it names may be deleted now."""
    if key is None:
        return None
    job = await db.read(_view_of, jobs.find_once, settings.lease_s, Once(project, key, "jobs", digest))
    return None if job is None else _replayed(job)


async def accept(
    new: NewJob,
    db: Database,
    settings: Settings,
    wake_workers: Callable[[], None],
    limiter: Limiter,
    audit: Auditor,
) -> Response:
    """Store a job that was checked, wake a worker, and return the answer."""
    bounds, room = await limiter.of(new.project), await limiter.room(new.project)

    def write(connection: Connection) -> tuple[dict[str, Any], bool]:
        job, created = jobs.submit(connection, new, bounds.jobs_queued, room)
        if created:
            kind = "job" if new.kind == "distillation" else new.kind
            audit.append(connection, f"{kind}.submit", job.id, name=job.name)
        return views(connection, [job], settings.lease_s)[0], created

    job, created = await db.write(write)
    failpoint("submit.committed")
    wake_workers()
    return Json(job, 201, _location(job)) if created else _replayed(job)


def _location(job: dict[str, Any]) -> dict[str, str]:
    return {"Location": job["links"]["self"]}


def _replayed(job: dict[str, Any]) -> Response:
    return Json(job, 200, {**_location(job), "Idempotent-Replayed": "true"})


# An action and its answer are one transaction: otherwise an outage between the two would cause a 503 for an action
# that was done.


def _view_of(
    connection: Connection, /, action: Callable[..., Job | None], lease_s: float, *args: Any, **kwargs: Any
) -> Any:
    """Run a store function that returns a job, and return the job's view."""
    job = action(connection, *args, **kwargs)
    return None if job is None else views(connection, [job], lease_s)[0]


def listed(connection: Connection, project: str, query: JobQuery, lease_s: float) -> Response:
    """Return a page of jobs as a list shows them."""
    rows, following = jobs.list_jobs(connection, project, query)
    reasons = workers.waiting_reasons(connection, rows, lease_s)
    return page([job_summary(job, reasons.get(job.id)) for job in rows], following)


def views(connection: Connection, rows: Iterable[Job], lease_s: float) -> list[dict[str, Any]]:
    reasons = workers.waiting_reasons(connection, rows, lease_s)
    return [job_view(job, reasons.get(job.id)) for job in rows]
