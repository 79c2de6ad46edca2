from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from base.errors import DatabaseUnavailable
from base.jobs import TERMINAL
from store import jobs, lifecycle, teachers
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import TeacherUnavailable
from store.lifecycle import Claim
from store.records import Job
from store.workers import waiting_reasons
from tests.clock import SettableClock
from tests.store.helpers import ERROR, LEASE_S, SHA256, claimed, event_types, read_job, run_concurrently, submitted

STUDENT = NewArtifact("student.safetensors", SHA256, 4, "application/octet-stream")


def taught_by(*names: str, **changes: Any) -> dict[str, Any]:
    """The fields of a new job with these teachers; several are a list, as in a spec."""
    each = [{"checkpoint": name, "architecture": "resnet56"} for name in names]
    return {"resolved_spec": {"name": names[0], "teacher": each if len(each) > 1 else each[0]}, **changes}


def pupil(database: Database, *teacher_jobs: Job, **changes: Any) -> Job:
    return submitted(database, **taught_by(*(f"job:{job.id}" for job in teacher_jobs), **changes))


def succeed(database: Database, claim: Claim, *files: NewArtifact) -> None:
    with database.begin() as connection:
        assert lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, files or [STUDENT])


def fail(database: Database, claim: Claim) -> None:
    with database.begin() as connection:
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, None)


def act(database: Database, action: Callable[..., Any], job: Job) -> Any:
    with database.begin() as connection:
        return action(connection, job.id)


def claim_or_none(database: Database) -> Claim | None:
    with database.begin() as connection:
        return lifecycle.claim(connection, "worker", LEASE_S, takeover=True)


def test_waiting_job_is_not_claimed_counted_or_rung_for(database: Database, clock: SettableClock):
    teacher = submitted(database)
    waiting = pupil(database, teacher, priority=50)
    assert claimed(database).job.id == teacher.id
    assert claim_or_none(database) is None
    clock.advance(20)
    with database.begin() as connection:
        assert not lifecycle.has_claimable(connection, takeover=False)
        assert lifecycle.sweep(connection, takeover=False) == []
        assert teachers.count_waiting(connection) == 1
        reason = waiting_reasons(connection, [read_job(database, waiting.id)], LEASE_S)[waiting.id]
    assert (reason.reason, reason.position, reason.jobs) == ("teacher", None, (teacher.id,))
    assert reason.message == f"it waits for the student of job {teacher.id}, which is running"


def test_job_that_starts_from_a_students_weights_waits_for_them_as_for_a_teacher(database: Database):
    first = f"job:{submitted(database).id}"
    spec = {
        "teacher": None,
        "student": [{"architecture": "resnet20", "checkpoint": first}, {"architecture": "resnet20"}],
        "assistants": [{"architecture": "resnet32", "checkpoint": first}],
    }
    waiting = submitted(database, resolved_spec=spec)
    assert claimed(database).job.id == first.removeprefix("job:") and claim_or_none(database) is None
    with database.begin() as connection:
        succeeded = lifecycle.finish_succeeded(connection, first.removeprefix("job:"), 1, {}, [STUDENT])
    assert succeeded
    job = read_job(database, waiting.id).resolved_spec
    digest = f"blob:sha256:{SHA256}"
    assert [one.get("checkpoint") for one in (*job["student"], *job["assistants"])] == [digest, None, digest]
    assert job["teacher"] is None and event_types(database, waiting.id) == ["queued", "teacher_ready"]


def test_student_of_a_teacher_that_succeeds_is_written_into_the_spec_once(database: Database):
    waiting = pupil(database, submitted(database))
    succeed(database, claimed(database))
    job = read_job(database, waiting.id)
    assert job.resolved_spec["teacher"] == {"checkpoint": f"blob:sha256:{SHA256}", "architecture": "resnet56"}
    assert job.resolved_spec["name"] == waiting.resolved_spec["name"], "a name is text, also if it looks like a job"
    assert event_types(database, waiting.id) == ["queued", "teacher_ready"]
    assert claimed(database).job.resolved_spec == job.resolved_spec
    with database.connect() as connection:
        assert teachers.count_waiting(connection) == 0


def test_job_with_several_teachers_waits_for_all_of_them(database: Database):
    known = f"blob:sha256:{'7' * 64}"
    first, second = submitted(database, priority=1), submitted(database)
    waiting = submitted(database, **taught_by(f"job:{first.id}", known, f"job:{second.id}"))
    succeed(database, claimed(database))
    with database.connect() as connection:
        assert teachers.list_awaited(connection, [waiting.id]) == {waiting.id: [(second.id, "queued")]}
    other = NewArtifact("student.safetensors", "6" * 64, 4, "application/octet-stream")
    succeed(database, claimed(database), other)
    checkpoints = [one["checkpoint"] for one in read_job(database, waiting.id).resolved_spec["teacher"]]
    assert checkpoints == [f"blob:sha256:{SHA256}", known, f"blob:sha256:{'6' * 64}"]
    assert claimed(database).job.id == waiting.id


@pytest.mark.parametrize("how", ["failed", "cancelled", "deadline", "no student"])
def test_teacher_that_ends_otherwise_fails_the_whole_chain(database: Database, clock: SettableClock, how: str):
    first = submitted(database, deadline_s=60)
    second = pupil(database, first)
    third = pupil(database, second)
    fourth = pupil(database, first, third)
    act(database, jobs.pause, third)
    match how:
        case "failed":
            fail(database, claimed(database))
        case "cancelled":
            act(database, jobs.cancel, first)
        case "deadline":
            clock.advance(61)
            with database.begin() as connection:
                lifecycle.sweep(connection, takeover=False)
        case _:
            succeed(database, claimed(database), NewArtifact("report.json", SHA256, 2, "application/json"))
    for job, cause in ((second, first), (third, second), (fourth, first)):
        failed = read_job(database, job.id)
        assert failed.status == "failed" and failed.finished_at is not None
        assert failed.error["code"] == "teacher_unavailable" and not failed.error["retryable"]
        assert failed.error["message"].startswith(f"job {cause.id}, whose student this job needs, ")
        assert failed.error["hint"] == f"retry job {cause.id} first, then this one"
        assert event_types(database, job.id)[-1] == "failed"
    assert claim_or_none(database) is None


@pytest.mark.parametrize("how", ["cancel of a running teacher", "owner of the teacher lost"])
def test_teacher_that_a_sweep_or_its_owner_ends_fails_the_waiting_job(
    database: Database, clock: SettableClock, how: str
):
    teacher = submitted(database)
    waiting = pupil(database, teacher)
    claim = claimed(database)
    act(database, jobs.cancel, teacher)
    assert read_job(database, waiting.id).status == "queued", "the teacher's process has not ended yet"
    if how == "owner of the teacher lost":
        clock.advance(LEASE_S + 1)
    with database.begin() as connection:
        if how == "owner of the teacher lost":
            lifecycle.sweep(connection, takeover=True)
        else:
            lifecycle.release(connection, teacher.id, claim.fence, "drain")
    assert read_job(database, teacher.id).status == "cancelled"
    assert read_job(database, waiting.id).error["message"].endswith("is cancelled")


def test_paused_teacher_keeps_its_job_waiting(database: Database):
    teacher = submitted(database)
    waiting = pupil(database, teacher)
    act(database, jobs.pause, teacher)
    assert read_job(database, waiting.id).status == "queued" and claim_or_none(database) is None
    act(database, jobs.resume, teacher)
    succeed(database, claimed(database))
    assert claimed(database).job.id == waiting.id


@pytest.mark.parametrize(
    ("action", "again", "events"),
    [
        ("cancel", "retry", ["queued", "cancelled", "retried", "teacher_ready", "claimed"]),
        ("pause", "resume", ["queued", "paused", "teacher_ready", "resumed", "claimed"]),
    ],
)
def test_waiting_job_that_a_client_stops_starts_with_the_student_later(
    database: Database, action: str, again: str, events: list[str]
):
    waiting = pupil(database, submitted(database))
    act(database, getattr(jobs, action), waiting)
    succeed(database, claimed(database))
    assert claim_or_none(database) is None
    act(database, getattr(jobs, again), waiting)
    claim = claimed(database)
    assert claim.job.resolved_spec["teacher"]["checkpoint"] == f"blob:sha256:{SHA256}"
    assert event_types(database, waiting.id) == events, "nothing follows an end but a retry"


def test_waiting_job_past_its_deadline_fails(database: Database, clock: SettableClock):
    teacher = submitted(database)
    waiting = pupil(database, teacher, deadline_s=60)
    clock.advance(61)
    with database.begin() as connection:
        lifecycle.sweep(connection, takeover=False)
    assert read_job(database, waiting.id).error["code"] == "deadline_exceeded"
    assert read_job(database, teacher.id).status == "queued"


def test_retry_waits_again_once_the_teacher_is_retried(database: Database):
    teacher = submitted(database)
    waiting = pupil(database, teacher)
    fail(database, claimed(database))
    with pytest.raises(TeacherUnavailable, match=f"job {teacher.id}, .* is failed: retry it first"):
        act(database, jobs.retry, waiting)
    assert event_types(database, waiting.id) == ["queued", "failed"]
    act(database, jobs.retry, teacher)
    assert act(database, jobs.retry, waiting).error is None
    assert claimed(database).job.id == teacher.id and claim_or_none(database) is None


def test_retry_after_the_teacher_succeeded_starts(database: Database):
    teacher = submitted(database)
    waiting = pupil(database, teacher)
    fail(database, claimed(database))
    act(database, jobs.retry, teacher)
    succeed(database, claimed(database))
    assert event_types(database, waiting.id) == ["queued", "failed"]
    job = act(database, jobs.retry, waiting)
    assert job.resolved_spec["teacher"]["checkpoint"] == f"blob:sha256:{SHA256}"
    assert claimed(database).job.id == waiting.id


def test_retry_without_its_teacher_job_is_refused(database: Database):
    teacher = submitted(database)
    waiting = pupil(database, teacher)
    act(database, jobs.cancel, teacher)
    act(database, jobs.delete, teacher)
    with pytest.raises(TeacherUnavailable, match="was deleted: submit a new job"):
        act(database, jobs.retry, waiting)
    act(database, jobs.delete, waiting)


def test_submit_of_a_job_whose_teacher_has_ended_since_its_check(database: Database):
    ready, failed = submitted(database), submitted(database)
    succeed(database, claimed(database))
    fail(database, claimed(database))
    job = pupil(database, ready)
    assert job.resolved_spec["teacher"]["checkpoint"] == f"blob:sha256:{SHA256}"
    assert event_types(database, job.id) == ["queued", "teacher_ready"] and job.event_seq == 2
    with pytest.raises(TeacherUnavailable, match="is failed: retry it first"):
        pupil(database, failed)
    with pytest.raises(TeacherUnavailable, match="was deleted"):
        submitted(database, **taught_by("job:job_0"))
    with database.connect() as connection:
        assert jobs.count_by_status(connection) == {"queued": 1, "succeeded": 1, "failed": 1}, "nothing was stored"


def test_submit_again_with_the_key_of_a_waiting_job_is_the_same_job(database: Database):
    teacher = submitted(database)
    waiting = pupil(database, teacher, idempotency_key="k")
    fail(database, claimed(database))
    assert pupil(database, teacher, idempotency_key="k").id == waiting.id


def test_end_of_a_teacher_that_is_not_committed_changes_nothing(database: Database):
    """The digest, the event and `succeeded` are one transaction."""
    waiting = pupil(database, submitted(database))
    claim = claimed(database)
    with pytest.raises(RuntimeError, match="killed"), database.begin() as connection:
        lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, [STUDENT])
        raise RuntimeError("killed")
    assert read_job(database, waiting.id) == waiting and event_types(database, waiting.id) == ["queued"]
    succeed(database, claim)
    assert claimed(database).job.id == waiting.id


@pytest.mark.parametrize("how", ["succeeded", "failed"])
def test_submits_that_race_with_the_end_of_the_teacher_never_wait_for_ever(database: Database, how: str):
    end = succeed if how == "succeeded" else fail
    for _ in range(5):
        teacher = submitted(database)
        ends, follows = partial(end, database, claimed(database)), partial(pupil, database, teacher)
        results = run_concurrently([ends, *[follows] * 4])
        assert results[0] is None
        for result in results[1:]:
            if isinstance(result, Job):
                job = read_job(database, result.id)
                checkpoint = job.resolved_spec["teacher"]["checkpoint"]
                if how == "succeeded":
                    assert (job.status, checkpoint) == ("queued", f"blob:sha256:{SHA256}")
                    act(database, jobs.cancel, job)
                else:
                    assert job.error["code"] == "teacher_unavailable"
            else:
                assert how == "failed" and isinstance(result, TeacherUnavailable)
        with database.connect() as connection:
            assert set(jobs.count_by_status(connection)) <= set(TERMINAL)


def test_ends_of_a_web_of_jobs_at_once_do_not_block_each_other(database: Database, clock: SettableClock):
    """The first ends, two of the middle are cancelled, a sweep fails the others: all lock rows in the same order."""
    for _ in range(8):
        first = submitted(database)
        claim = claimed(database)
        left, right = pupil(database, first, deadline_s=60), pupil(database, first, deadline_s=60)
        below = pupil(database, left, deadline_s=60)
        last = pupil(database, below, right)
        clock.advance(61)

        def sweep() -> None:
            with database.begin() as connection:
                lifecycle.sweep(connection, takeover=False)

        stops = [partial(act, database, jobs.cancel, job) for job in (right, left, last)]
        for result in run_concurrently([partial(fail, database, claim), sweep, *stops]):
            assert not isinstance(result, DatabaseUnavailable), result
        for job in (left, right, below, last):
            assert read_job(database, job.id).status in ("failed", "cancelled")


def test_two_teachers_that_succeed_at_once_are_both_written(database: Database):
    for _ in range(5):
        first, second = submitted(database), submitted(database)
        waiting = pupil(database, first, second)
        claims = [claimed(database), claimed(database)]
        assert run_concurrently([partial(succeed, database, claim) for claim in claims]) == [None, None]
        job = read_job(database, waiting.id)
        assert [one["checkpoint"] for one in job.resolved_spec["teacher"]] == [f"blob:sha256:{SHA256}"] * 2
        assert event_types(database, waiting.id) == ["queued", "teacher_ready", "teacher_ready"]
        act(database, jobs.cancel, waiting)
