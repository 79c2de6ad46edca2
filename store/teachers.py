"""Jobs that wait for their teachers: a job may name `job:<id>` as its teacher before that job has ended, or as the
checkpoint that a student or an assistant starts from. Both are called its teachers here.

A row of `job_teachers` stands for such a name in a resolved spec. It is written with the job, and while a job has one,
no worker can claim it. When the named job succeeds, the same transaction writes the digest of its student in the place
of the name, and deletes the row. When it ends otherwise, the same transaction fails the waiting job, and then the jobs
that wait for that one. A job that has ended keeps its rows: no event follows its end, and a retry waits again, or takes
the digest of a student that is there by then.

A job can name only jobs that exist already, so jobs never wait for each other in a circle. For the same reason a
teacher's id is the smaller one: rows of jobs are locked in the order of ids, which prevents deadlocks.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, and_, delete, func, insert, literal, or_, select

from base import errors
from base.jobs import TERMINAL
from base.references import BLOB, JOB, STUDENT_FILE
from store import artifacts
from store.errors import NotFound, TeacherUnavailable
from store.events import append_event, update_job
from store.lists import facets_of, put_facets
from store.records import Job, database_now
from store.tables import job_facets, job_teachers, jobs

NAMING = ("teacher", "student", "assistants")
"""The fields of a resolved spec in which a checkpoint may be that of another job."""


def waits_for_teacher(job: FromClause) -> ColumnElement[bool]:
    """Return the condition that a job whose student teaches this one has not succeeded."""
    return select(literal(1)).where(job_teachers.c.job_id == job.c.id).correlate(job).exists()


def append_change(connection: Connection, job: Job, type: str, **data: Any) -> None:
    """Write the event of a change of status. If the job has ended, the jobs that wait for its student learn it."""
    append_event(connection, job, type, **data)
    if job.status == "succeeded":
        _give_student(connection, job)
    elif job.status in TERMINAL:
        _fail_waiting(connection, job)


def await_teachers(connection: Connection, job: Job) -> Job:
    """Write the rows of a job that is submitted now. Returns the job, with digests if teachers are ready meanwhile.

    Raises TeacherUnavailable if a teacher's job has ended in another way since the spec was checked.
    """
    for teacher_id in _named(job.resolved_spec):
        connection.execute(insert(job_teachers).values(job_id=job.id, teacher_job_id=teacher_id))
    return take_students(connection, job)


def take_students(connection: Connection, job: Job) -> Job:
    """Write the digests of students that are there into the spec of a job that is queued now. Returns the job.

    Raises TeacherUnavailable if a job that should teach it has failed, was cancelled or deleted.
    """
    for teacher_id, status in lock_awaited(connection, job.id).items():
        if status in (None, "failed", "cancelled"):
            raise TeacherUnavailable(teacher_id, status)
        if status == "succeeded":
            file = artifacts.get(connection, teacher_id, STUDENT_FILE)
            job = _write_digest(connection, job.id, teacher_id, file.sha256) or job
    return job


def lock_awaited(connection: Connection, job_id: str) -> dict[str, str | None]:
    """Lock the jobs that a job waits for: their statuses, which this returns, cannot change until the commit.

    None stands for a job that was deleted. A row's own job is locked after these, never before.
    """
    awaited = select(job_teachers.c.teacher_job_id).where(job_teachers.c.job_id == job_id)
    ids = connection.scalars(awaited.order_by(job_teachers.c.teacher_job_id)).all()
    statuses = select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(ids)).order_by(jobs.c.id).with_for_update(read=True)
    found = {id: status for id, status in connection.execute(statuses)} if ids else {}
    return {id: found.get(id) for id in ids}


def lock_with_waiting(connection: Connection, job_ids: Sequence[str]) -> None:
    """Lock these jobs and all that wait for a teacher, until the commit: the end of several jobs ends others, too."""
    several = or_(jobs.c.id.in_(job_ids), and_(jobs.c.status.in_(("queued", "paused")), waits_for_teacher(jobs)))
    connection.execute(select(jobs.c.id).where(several).order_by(jobs.c.id).with_for_update(key_share=True))


def list_awaited(connection: Connection, job_ids: Sequence[str]) -> dict[str, list[tuple[str, str | None]]]:
    """Return the jobs that each of these jobs waits for, with their statuses. Jobs that wait for none are left out."""
    rows = (
        select(job_teachers.c.job_id, job_teachers.c.teacher_job_id, jobs.c.status)
        .join_from(job_teachers, jobs, jobs.c.id == job_teachers.c.teacher_job_id, isouter=True)
        .where(job_teachers.c.job_id.in_(job_ids))
        .order_by(job_teachers.c.teacher_job_id)
    )
    found: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for job_id, teacher_id, status in connection.execute(rows):
        found[job_id].append((teacher_id, status))
    return found


def count_waiting(connection: Connection) -> int:
    """Return the number of queued jobs that no worker can start yet, because they wait for a teacher."""
    waiting = select(func.count()).select_from(jobs).where(jobs.c.status == "queued", waits_for_teacher(jobs))
    return connection.execute(waiting).scalar_one()


def _give_student(connection: Connection, teacher: Job) -> None:
    """Write the digest of a job's student into the jobs that wait for it."""
    waiting = _waiting_for(connection, teacher.id)
    if not waiting:
        return
    try:
        file = artifacts.get(connection, teacher.id, STUDENT_FILE)
    except NotFound:
        _fail_waiting(connection, teacher)
        return
    for job_id in waiting:
        _write_digest(connection, job_id, teacher.id, file.sha256)


def _write_digest(connection: Connection, job_id: str, teacher_id: str, sha256: str) -> Job | None:
    """Write a student's digest into the spec of a job, if that has not ended: no event follows the end of a job."""
    # Lock the row before its spec is read: another of its teachers may succeed at the same time.
    locked = select(jobs.c.resolved_spec).where(_is_open(job_id)).with_for_update(key_share=True)
    spec = connection.execute(locked).scalar_one_or_none()
    if spec is None:
        return None
    replaced = {name: _replaced(spec.get(name), JOB + teacher_id, BLOB + sha256) for name in NAMING if name in spec}
    job = update_job(connection, jobs.c.id == job_id, resolved_spec={**spec, **replaced})
    assert job is not None, "the row is locked"  # noqa: S101
    row = job_teachers.c
    connection.execute(delete(job_teachers).where(row.job_id == job_id, row.teacher_job_id == teacher_id))
    put_facets(connection, job_facets, job, facets_of(job.spec, job.resolved_spec))
    append_event(connection, job, "teacher_ready", teacher_job=teacher_id, sha256=sha256)
    return job


def _fail_waiting(connection: Connection, ended: Job) -> None:
    """Fail the jobs that wait for a job that has ended without a student, and the jobs that wait for those."""
    waiting: list[str] = []
    errors_by_job: dict[str, dict[str, Any]] = {}

    def add(teacher: Job) -> None:
        for job_id in _waiting_for(connection, teacher.id):
            if job_id not in errors_by_job:
                errors_by_job[job_id] = _unavailable(teacher)
                heappush(waiting, job_id)

    add(ended)
    while waiting:
        job_id = heappop(waiting)
        error = errors_by_job[job_id]
        job = update_job(connection, _is_open(job_id), status="failed", finished_at=database_now(), error=error)
        if job is not None:
            append_event(connection, job, "failed", error=error)
            add(job)


def _unavailable(teacher: Job) -> dict[str, Any]:
    how = f"failed with {teacher.error['code']}" if teacher.error else f"is {teacher.status}"
    if teacher.status == "succeeded":
        how = f"delivered no {STUDENT_FILE}"
    return errors.TeacherUnavailable(
        f"job {teacher.id}, whose student this job needs, {how}", f"retry job {teacher.id} first, then this one"
    ).as_dict()


def _waiting_for(connection: Connection, teacher_id: str) -> Sequence[str]:
    waiting = select(job_teachers.c.job_id).where(job_teachers.c.teacher_job_id == teacher_id)
    return connection.scalars(waiting.order_by(job_teachers.c.job_id)).all()


def _is_open(job_id: str) -> ColumnElement[bool]:
    """The condition that a job that waits for a teacher has not ended."""
    return and_(jobs.c.id == job_id, jobs.c.status.in_(("queued", "paused")))


def _named(resolved_spec: dict[str, Any]) -> list[str]:
    """Return the ids of the jobs whose students a resolved spec names, sorted."""
    named = (name for field in NAMING for name in _checkpoints(resolved_spec.get(field)))
    return sorted({name.removeprefix(JOB) for name in named})


def _checkpoints(networks: Any) -> Iterator[str]:
    for one in networks if isinstance(networks, list) else [networks]:
        checkpoint = one.get("checkpoint") if isinstance(one, dict) else None
        if checkpoint is not None and checkpoint.startswith(JOB):
            yield checkpoint


def _replaced(network: Any, name: str, digest: str) -> Any:
    """Return a teacher or student, or a list of them, with this checkpoint replaced."""
    if isinstance(network, list):
        return [_replaced(one, name, digest) for one in network]
    if not isinstance(network, dict) or network.get("checkpoint") != name:
        return network
    return {**network, "checkpoint": digest}
