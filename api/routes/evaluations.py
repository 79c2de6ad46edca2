"""Evaluations of registered models: jobs that measure a model on all test images of a data set."""

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from api.dependencies import AuditDep, Caller, Config, Db, LimiterDep, ReferencesDep, WakeWorkers
from api.problems import (
    IdempotencyConflict,
    InspectionsBusy,
    NotFound,
    NotReady,
    QuotaExceeded,
    SpecInvalid,
    StorageFull,
    TooManyInspections,
    WarningRefused,
    responses,
    summary,
)
from api.references import ReferenceFault
from api.routes.jobs import SUBMITTED, Key, accept, listed, new_job, replay
from api.schemas import NameOrId, NewEvaluation, Page
from api.submission import examine_evaluation
from base.references import BLOB
from base.wire import JobSummary, JobView
from kdcore.catalog.facts import model_facts
from kdcore.spec import Dataset, EvaluationSpec, Teacher
from store import registry
from store.idempotency import digest_of
from store.jobs import JobQuery
from store.records import NewestQuery

router = APIRouter(prefix="/v1/models/{name_or_id}/evaluations", tags=["models"])


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses={
        **SUBMITTED,
        **responses(
            NotFound,
            NotReady,
            SpecInvalid,
            WarningRefused,
            IdempotencyConflict,
            QuotaExceeded,
            TooManyInspections,
            InspectionsBusy,
            StorageFull,
        ),
    },
)
async def submit(
    *,
    name_or_id: NameOrId,
    sent: NewEvaluation,
    references: ReferencesDep,
    caller: Caller,
    db: Db,
    wake_workers: WakeWorkers,
    settings: Config,
    limiter: LimiterDep,
    audit: AuditDep,
    idempotency_key: Key = None,
) -> Response:
    """Submit a job that measures a model on all test images of a data set.

    The job has the kind `evaluation`, and is read, watched, cancelled and retried as any other, at `/v1/jobs/{id}`. Its
    `result` has the accuracy with its 95 % interval, the top-5 accuracy, the loss, and the accuracy of each class.
    """
    spec = {"model": name_or_id, **sent.model_dump(mode="json", exclude_unset=True)}
    digest = digest_of("jobs", spec)
    if known := await replay(db, settings, caller.project, idempotency_key, digest):
        return known
    try:
        model = await references.ready(registry.models, name_or_id)
    except ReferenceFault as fault:
        raise NotReady(fault.message) from None
    facts = model_facts(model.facts)
    asked = EvaluationSpec(
        name=sent.name,
        labels=sent.labels,
        model=Teacher.model_validate(
            {
                facts.field: f"{BLOB}{model.sha256}",
                "preprocessing": sent.preprocessing,
                "class_map": sent.class_map,
            }
        ),
        dataset=Dataset(source=sent.dataset, image_size=sent.image_size),
        strict=sent.strict,
        scheduling=sent.scheduling,
    )
    examined = await examine_evaluation(asked, facts, references)
    if examined.resolved is None:
        problem = WarningRefused if examined.is_refused_for_warnings else SpecInvalid
        raise problem(summary(examined.faults), examined.faults)
    new = new_job(examined.resolved, spec, digest, idempotency_key, caller, settings, examined.warnings)
    return await accept(new, db, settings, wake_workers, limiter, audit)


@router.get("", response_model=Page[JobSummary], responses=responses(NotFound))
async def listing(
    name_or_id: NameOrId, caller: Caller, db: Db, settings: Config, query: Annotated[NewestQuery, Query()]
) -> Response:
    """The evaluations of a model, newest first: of its bytes, also if they were registered under another name.

    They have the fields that a list of jobs shows.
    """

    def read(connection: Connection) -> Response:
        model = registry.models.get(connection, caller.project, name_or_id)
        of_model = JobQuery(kind="evaluation", model=f"sha256:{model.sha256}", limit=query.limit, after=query.after)
        return listed(connection, caller.project, of_model, settings.lease_s)

    return await db.scan(read)
