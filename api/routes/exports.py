"""Exports: jobs that write and measure files of a job's student, at any time after its first checkpoint."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.dependencies import AuditDep, Caller, Config, Db, Files, LimiterDep, WakeWorkers
from api.problems import (
    IdempotencyConflict,
    MalformedBody,
    NotExportable,
    NotFound,
    QuotaExceeded,
    SpecInvalid,
    StorageFull,
    responses,
    summary,
)
from api.routes.jobs import SUBMITTED, Key, accept, new_job, replay, views
from api.schemas import Id, NewExport, Page, page
from base.references import BLOB, blobs_in
from base.wakeup import MEMORY
from base.wire import JobView
from kdcore.spec import ExportSpec
from kdcore.spec.shipping import not_installed
from store import exports, jobs
from store.errors import NotExportable as Refused
from store.file_store import FileStore
from store.idempotency import digest_of
from store.jobs import JobQuery
from store.records import Job, NewestQuery

router = APIRouter(prefix="/v1/jobs/{job_id}/exports", tags=["exports"])


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses={
        **SUBMITTED,
        **responses(
            MalformedBody, NotFound, NotExportable, SpecInvalid, IdempotencyConflict, QuotaExceeded, StorageFull
        ),
    },
)
async def submit(
    *,
    job_id: Id,
    sent: NewExport,
    caller: Caller,
    db: Db,
    files: Files,
    wake_workers: WakeWorkers,
    settings: Config,
    limiter: LimiterDep,
    audit: AuditDep,
    idempotency_key: Key = None,
) -> Response:
    """Submit a job that writes files of a job's student, and measures each in its own runtime.

    The job may have succeeded, failed, or be cancelled, paused, waiting or running: its newest checkpoint is kept for
    the export, whatever becomes of the job. Without one the answer is 409, `not_exportable`, with what can be exported.

    The new job has the kind `export`, and is read, watched, cancelled and retried as any other, at `/v1/jobs/{id}`,
    where its artifacts are the files. Its `result` has a row of figures for each in `files`. A file that is worse than
    the student by more than the tolerance is refused: a warning `export_mismatch`, and no artifact. Deleting the job
    that trained the student deletes its exports, too.
    """
    spec = {"job": job_id, **sent.model_dump(mode="json", exclude_unset=True)}
    digest = digest_of("jobs", spec)
    if known := await replay(db, settings, caller.project, idempotency_key, digest):
        return known
    if settings.broker_url.startswith(MEMORY) and (faults := list(not_installed(sent.export))):
        raise SpecInvalid(summary(faults), faults)
    parent = await db.read(jobs.get, job_id, caller.project)
    await to_thread.run_sync(require_data, files, parent)

    def newest() -> list[exports.Weights]:
        with db.connect() as connection:
            return exports.of_job(connection, jobs.get(connection, job_id, caller.project), sent.checkpoint)

    weights = await to_thread.run_sync(exports.keep, files, newest)
    resolved = ExportSpec(
        name=sent.name,
        labels=sent.labels,
        strict=sent.strict,
        scheduling=sent.scheduling,
        job=parent.id,
        distillation=parent.resolved_spec,
        weights=f"{BLOB}{weights.sha256}",
        weights_format=weights.format,
        checkpoint=sent.checkpoint,
        step=weights.step,
        export=sent.export,
        export_options=sent.export_options,
    )
    if faults := resolved.metric_faults():
        raise SpecInvalid(summary(faults), faults)
    new = new_job(resolved, spec, digest, idempotency_key, caller, settings, summary=parent.summary)
    answer = await accept(new, db, settings, wake_workers, limiter, audit)
    await to_thread.run_sync(exports.keep_again, files, weights)
    return answer


@router.get("", response_model=Page[JobView], responses=responses(NotFound))
async def listing(
    job_id: Id, caller: Caller, db: Db, settings: Config, query: Annotated[NewestQuery, Query()]
) -> Response:
    """The exports of a job, newest first, with the figures of their files in `result`. A page may end early after some
    megabytes of them."""

    def read(connection: Connection) -> Response:
        jobs.get(connection, job_id, caller.project)
        of_job = JobQuery(kind="export", job=job_id, limit=query.limit, after=query.after)
        whole, following = jobs.list_full_jobs(connection, caller.project, of_job)
        return page(views(connection, whole, settings.lease_s), following)

    return await db.scan(read)


def require_data(files: FileStore, parent: Job) -> None:
    """Raise NotExportable if a file of the job's data is gone. The export would fail in each of its attempts, after
    each of which its worker waits longer, and all other jobs with it."""
    for digest in sorted(set(blobs_in(parent.resolved_spec.get("dataset")))):
        if not files.path(digest).is_file():
            raise Refused(f"the job's data is not stored any more: upload the file of {BLOB}{digest} again", [])
