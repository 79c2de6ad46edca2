"""The actions of clients: submit, find, cancel, pause, resume, retry, delete. `lifecycle` has those of workers."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field
from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, func, insert, or_, select, update
from sqlalchemy import delete as delete_from

from base.failpoints import failpoint
from base.jobs import TERMINAL, Kind, Status, allowed_actions
from base.references import blobs_in
from base.text import LIKE_AN_ID, Text
from base.warning import CODES, KNOWN_AT_SUBMIT
from store import alerts, idempotency, limits, projects
from store.errors import ActionNotAllowed, NotFound, StillUsed
from store.events import append_event, update_job
from store.idempotency import Once
from store.limits import Room
from store.lists import (
    BASELINE,
    VALUE,
    Filter,
    Order,
    Rows,
    facets_of,
    may_match,
    page_of_ids,
    put_facets,
    within_bytes,
)
from store.records import (
    JOB_COLUMNS,
    Job,
    LabelledQuery,
    ListedJob,
    Moment,
    NewJob,
    as_record,
    columns,
    database_now,
    new_id,
)
from store.tables import checkpoints, job_facets, jobs, metrics
from store.teachers import append_change, await_teachers, lock_awaited, take_students, waits_for_teacher

T = TypeVar("T")

Value = Annotated[str, Text(VALUE)]
NAMED = "As the spec names it, by its name or id,"

_ACTION_OF = {"cancelled": "cancel", "paused": "pause"}
"""The action that leads to a status."""

# Built once: building these queries costs more than running them, and no others run as often.
_BY_ID = select(*JOB_COLUMNS).where(jobs.c.id == bindparam("job_id"))
_BY_ID_IN_PROJECT = _BY_ID.where(jobs.c.project == bindparam("project"))


def submit(
    connection: Connection, new: NewJob, max_queued: int | None = None, room: Room | None = None
) -> tuple[Job, bool]:
    """Queue a job. Returns it, and False if it was queued before: the same key with the same body is the same job.

    Raises IdempotencyConflict if the key was used with another body. Concurrent requests with one key get one job.
    Raises LimitReached if the project has `max_queued` jobs that wait, and QuotaExceeded if it has no `room` for files.
    Raises TeacherUnavailable if a job that should teach this one has ended without a student.
    """
    job_id = new_id("job")
    if (known := idempotency.reserve(connection, _once(new), job_id)) is not None:
        return get(connection, known), False
    limits.require_queue(connection, new.project, max_queued)
    if room is not None:
        room.require(connection, new.project, 1)
    row = (
        insert(jobs)
        .values(
            **vars(new),
            id=job_id,
            status="queued",
            event_seq=1 + len(new.warnings),
            created_at=database_now(),
            deadline_at=None if new.deadline_s is None else database_now() + new.deadline_s,
        )
        .returning(*JOB_COLUMNS)
    )
    job = as_record(Job, connection.execute(row).one())
    put_facets(connection, job_facets, job, facets_of(job.spec, job.resolved_spec))
    append_event(connection, replace(job, event_seq=1), "queued")
    for seq, warning in enumerate(new.warnings, 2):
        append_event(connection, replace(job, event_seq=seq), "warning", **warning)
    alerts.write(connection, job)
    job = await_teachers(connection, job)
    projects.add_blobs(connection, job.project, blobs_in(job.resolved_spec))
    failpoint("submit.before_commit")
    return job, True


def _once(new: NewJob) -> Once | None:
    return None if new.idempotency_key is None else Once(new.project, new.idempotency_key, "jobs", new.spec_sha256)


def find_once(connection: Connection, once: Once) -> Job | None:
    """Return the job that was submitted by this request before, if any. Raises IdempotencyConflict."""
    known = idempotency.find(connection, once)
    return None if known is None else get(connection, known)


def get(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """Return a job by its id; with a project, only within it."""
    query = _BY_ID if project is None else _BY_ID_IN_PROJECT
    row = connection.execute(query, {"job_id": job_id, "project": project}).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    return as_record(Job, row)


def read_of_job(connection: Connection, job_id: str, project: str, read: Callable[..., T], *args: Any) -> T:
    """Return `read(connection, job_id, *args)`. Raises NotFound if the project has no such job."""
    get(connection, job_id, project)
    return read(connection, job_id, *args)


ORDERS = ("created_at", "finished_at", "name", "accuracy")
"""Each has an index that begins with the project and this column."""
OrderName = Literal[
    "-created_at", "created_at", "-finished_at", "finished_at", "name", "-name", "-accuracy", "accuracy"
]


def _split(given: Any) -> Any:
    """Return the values of a parameter that is sent several times, or once with commas."""
    several = [given] if isinstance(given, str) else given
    return [part for one in several for part in one.split(",")] if isinstance(several, list) else given


class JobQuery(LabelledQuery):
    """The page and the filters of a list of jobs, as query parameters. A filter is a field and a condition. Filters
    combine: a job is listed if it matches all."""

    status: Annotated[list[Status], BeforeValidator(_split)] = Field(
        default=[], max_length=6, description="One of these, sent several times or with commas."
    )
    kind: Kind | None = Field(default=None, description="Default: jobs of all kinds.")
    method: Value | None = Field(default=None, description="A sum by all its methods: kd+dkd.")
    name: Value | None = Field(default=None, description="The beginning of the name.")
    dataset: Value | None = Field(default=None, description=f"{NAMED} or sha256:<hex>.")
    teacher: Value | None = Field(default=None, description=f"{NAMED} an architecture, job:<id> or sha256:<hex>.")
    student: Value | None = Field(default=None, description="An architecture, or the checkpoint that it started from.")
    model: Value | None = Field(default=None, description="Of evaluations: the model, by its name or sha256:<hex>.")
    job: Value | None = Field(
        default=None, description="Of exports and others: the job whose student they take, by id."
    )
    sender: Value | None = Field(default=None, description="The key that submitted it, by its name or id.")
    created_after: Moment | None = Field(default=None, description="ISO 8601 with an offset: from this moment on.")
    created_before: Moment | None = Field(default=None, description="ISO 8601 with an offset: before this moment.")
    sort: OrderName = Field(
        default="-created_at", description="`-` is descending. Jobs without a value come last, in both directions."
    )
    view: Literal["summary", "full"] = Field(
        default="summary",
        description="full: with specs, results and warnings. A page then ends early after some megabytes of them.",
    )

    @property
    def order(self) -> Order:
        return Order.named(self.sort)

    def filters(self, project: str) -> Iterator[Filter]:
        rows = Rows(jobs, job_facets, project)
        if self.status:
            yield rows.where("status", lambda status: status.in_(self.status))
        if self.kind is not None:
            yield rows.where("kind", lambda kind: kind == self.kind)
        if self.method is not None:
            yield rows.where("method", lambda method: method == self.method)
        if self.name is not None:
            yield rows.starting("name", self.name)
        yield from rows.with_labels(self.labels)
        for facet in ("dataset", "teacher", "student", "model", "job"):
            if (value := getattr(self, facet)) is not None:
                yield rows.with_facet(facet, value)
        if self.sender is not None:
            by = "created_by" if LIKE_AN_ID.fullmatch(self.sender) else "created_by_name"
            yield rows.where(by, lambda key: key == self.sender)
        if self.created_after is not None:
            since = self.created_after.timestamp()
            yield rows.where("created_at", lambda at: at >= since)
        if self.created_before is not None:
            until = self.created_before.timestamp()
            yield rows.where("created_at", lambda at: at < until)


def list_jobs(connection: Connection, project: str, query: JobQuery) -> tuple[list[ListedJob], str | None]:
    """Return a page of jobs, and the `after` of the next page, None at the end."""
    rows = Rows(jobs, job_facets, project)
    filters = tuple(query.filters(project))
    ids, following = page_of_ids(connection, rows, filters, query.order, query.after, query.limit)
    return _in_order(connection, ListedJob, ids), following


def may_list(connection: Connection, project: str, query: JobQuery) -> bool:
    """Return False if it is known at once that the list is empty."""
    return may_match(connection, tuple(query.filters(project)))


def list_full_jobs(connection: Connection, project: str, query: JobQuery) -> tuple[list[Job], str | None]:
    """Return a page of whole jobs, which ends after some megabytes; see `list_jobs`."""
    rows = Rows(jobs, job_facets, project)
    filters = tuple(query.filters(project))
    ids, following = page_of_ids(connection, rows, filters, query.order, query.after, query.limit)
    fitting = within_bytes(connection, jobs, (jobs.c.spec, jobs.c.resolved_spec, jobs.c.result), ids)
    found = _in_order(connection, Job, fitting)
    if found and len(fitting) < len(ids):
        following = query.order.cursor(getattr(found[-1], query.order.column), found[-1].id)
    return found, following


def _in_order(connection: Connection, record: type[T], ids: Sequence[str]) -> list[T]:
    """Return the jobs of these ids, in their order."""
    found = connection.execute(select(jobs.c.id.label("key"), *columns(jobs, record)).where(jobs.c.id.in_(ids)))
    by_id = {row[0]: record(*row[1:]) for row in found} if ids else {}
    return [by_id[id] for id in ids if id in by_id]


def with_baseline(connection: Connection, project: str, key: str, limit: int = 3) -> list[Job]:
    """Return the newest jobs that have trained the student alone with this key (`kdcore.spec.offered_key`)."""
    named = (job_facets.c.project == project, job_facets.c.facet == BASELINE, job_facets.c.value == key)
    of_key = select(*JOB_COLUMNS).join(job_facets, job_facets.c.id == jobs.c.id).where(*named)
    newest = of_key.where(jobs.c.status == "succeeded").order_by(jobs.c.id.desc()).limit(limit)
    return [as_record(Job, row) for row in connection.execute(newest)]


def newest_evaluations(connection: Connection, project: str, model_sha256: str) -> list[Job]:
    """Return the newest evaluation that succeeded for each data set, by its bytes and options, newest first."""
    of_model = JobQuery(kind="evaluation", model=f"sha256:{model_sha256}", status=["succeeded"], limit=100)
    rows, _following = list_full_jobs(connection, project, of_model)
    newest: dict[str, Job] = {}
    for job in rows:
        newest.setdefault(json.dumps(job.resolved_spec["dataset"], sort_keys=True), job)
    return list(newest.values())


def count_by_status(connection: Connection, project: str | None = None) -> dict[str, int]:
    """Return the number of jobs in each status that occurs."""
    counts = select(jobs.c.status, func.count()).group_by(jobs.c.status)
    if project is not None:
        counts = counts.where(jobs.c.project == project)
    return {status: count for status, count in connection.execute(counts)}


def queue(connection: Connection, project: str | None = None) -> tuple[int, float]:
    """Return the number of queued jobs that are due and wait for no teacher, and the age of the oldest in seconds."""
    now = database_now()
    due = select(func.count(), func.coalesce(now - func.min(jobs.c.created_at), 0.0)).where(
        jobs.c.status == "queued", func.coalesce(jobs.c.not_before, jobs.c.created_at) <= now, ~waits_for_teacher(jobs)
    )
    if project is not None:
        due = due.where(jobs.c.project == project)
    count, age_s = connection.execute(due).one()
    return int(count), float(age_s)


def cancel(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """Cancel a waiting job at once, or request the cancellation of a running one. Idempotent."""
    waits = jobs.c.status.in_(("queued", "paused"))
    can_request = and_(jobs.c.status == "running", func.coalesce(jobs.c.requested, "") != "cancel")
    job = update_job(
        connection,
        and_(_is(job_id, project), or_(waits, can_request)),
        status=case((waits, "cancelled"), else_=jobs.c.status),
        requested=case((can_request, "cancel")),
        fence=jobs.c.fence + case((waits, 1), else_=0),
        finished_at=case((waits, database_now())),
    )
    if job is None:
        return _done_already(connection, job_id, project, "cancel")
    append_change(connection, job, "cancelled" if job.status == "cancelled" else "cancel_requested")
    return job


def pause(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """Pause a queued job at once, or request a running one to save its state and stop. Idempotent.

    A job whose cancellation is requested cannot be paused.
    """
    waits = jobs.c.status == "queued"
    can_request = and_(jobs.c.status == "running", jobs.c.requested.is_(None))
    job = update_job(
        connection,
        and_(_is(job_id, project), or_(waits, can_request)),
        status=case((waits, "paused"), else_=jobs.c.status),
        requested=case((can_request, "pause")),
    )
    if job is None:
        return _done_already(connection, job_id, project, "pause")
    append_event(connection, job, "paused" if job.status == "paused" else "pause_requested")
    return job


def resume(connection: Connection, job_id: str, project: str | None = None) -> Job:
    """Return a paused job to the queue, at its old position, because the queue is ordered by age."""
    paused = and_(_is(job_id, project), jobs.c.status == "paused")
    job = update_job(connection, paused, status="queued", not_before=None)
    if job is None:
        raise _not_allowed(get(connection, job_id, project), "resume")
    append_event(connection, job, "resumed")
    return job


def retry(
    connection: Connection,
    job_id: str,
    project: str | None = None,
    *,
    from_scratch: bool = False,
    max_queued: int | None = None,
) -> Job:
    """Queue a failed or cancelled job again, with all its attempts and its whole deadline.

    It continues from its last checkpoint. With `from_scratch`, its checkpoints and curves are deleted instead. The
    collector deletes their files. Raises TeacherUnavailable if a job whose student should teach it has failed, was
    cancelled or deleted; if that job has succeeded by now, its student's digest is taken. `max_queued`: see `submit`.
    """
    if project is not None and get(connection, job_id, project).status in ("failed", "cancelled"):
        limits.require_queue(connection, project, max_queued)
    values: dict[str, Any] = {"attempts_without_progress": 0, "error": None, "not_before": None, "finished_at": None}
    if from_scratch:
        early = [one for one in get(connection, job_id, project).warnings if CODES[one["code"]] in KNOWN_AT_SUBMIT]
        values |= {"checkpoint_step": None, "claimed_step": None, "progress": None, "warnings": early}
    ended = and_(_is(job_id, project), jobs.c.status.in_(("failed", "cancelled")))
    lock_awaited(connection, job_id)
    deadline_at = database_now() + jobs.c.deadline_s
    job = update_job(connection, ended, status="queued", deadline_at=deadline_at, **values)
    if job is None:
        raise _not_allowed(get(connection, job_id, project), "retry")
    if from_scratch:
        for table in (checkpoints, metrics):
            connection.execute(delete_from(table).where(table.c.job_id == job_id))
        alerts.reset(connection, job_id)
    append_event(connection, job, "retried", **{"from": "scratch" if from_scratch else "checkpoint"})
    return take_students(connection, job)


def relabel(connection: Connection, job_id: str, labels: dict[str, str], project: str | None = None) -> Job:
    """Replace the labels of a job, in any status. Its specs stay as they are."""
    changed = update(jobs).where(_is(job_id, project)).values(labels=labels).returning(*JOB_COLUMNS)
    row = connection.execute(changed).one_or_none()
    if row is None:
        raise NotFound("job", job_id)
    job = as_record(Job, row)
    put_facets(connection, job_facets, job, facets_of(job.spec, job.resolved_spec))
    return job


def delete(connection: Connection, job_id: str, project: str | None = None) -> list[str]:
    """Delete a job that has ended, with all its rows and the jobs that took its student, such as exports. Returns the
    ids of all: the caller deletes their files. Raises StillUsed while one of these has not ended."""
    users = _users(connection, job_id)
    if open_ones := [user for user, status in users.items() if status not in TERMINAL]:
        raise StillUsed(get(connection, job_id, project).status, open_ones)
    deleted = delete_from(jobs).where(_is(job_id, project), jobs.c.status.in_(TERMINAL)).returning(jobs.c.id)
    if connection.execute(deleted).one_or_none() is None:
        raise _not_allowed(get(connection, job_id, project), "delete")
    if users:
        connection.execute(delete_from(jobs).where(jobs.c.id.in_(users), jobs.c.status.in_(TERMINAL)))
    return [job_id, *users]


def _users(connection: Connection, job_id: str) -> dict[str, str]:
    """Return the statuses of the jobs that take the student of a job, by id."""
    facet, own = job_facets.c, select(jobs.c.project).where(jobs.c.id == job_id).scalar_subquery()
    naming = and_(facet.project == own, facet.facet == "job", facet.value == job_id)
    query = select(jobs.c.id, jobs.c.status).select_from(jobs.join(job_facets, facet.id == jobs.c.id)).where(naming)
    return {row.id: row.status for row in connection.execute(query)}


def _is(job_id: str, project: str | None) -> ColumnElement[bool]:
    return jobs.c.id == job_id if project is None else and_(jobs.c.id == job_id, jobs.c.project == project)


def _done_already(connection: Connection, job_id: str, project: str | None, action: str) -> Job:
    """Return the job if the action was requested or done before; the client may have lost the first answer."""
    job = get(connection, job_id, project)
    if action in (job.requested, _ACTION_OF.get(job.status)):
        return job
    raise _not_allowed(job, action)


def _not_allowed(job: Job, action: str) -> ActionNotAllowed:
    return ActionNotAllowed(job.status, job.requested, action, allowed_actions(job.status, job.requested))
