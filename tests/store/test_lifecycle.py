from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Connection, update

from base.errors import StorageFull
from store import artifacts, attempts, checkpoints, events, jobs, lifecycle, metrics
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import LeaseLost
from store.tables import jobs as job_rows
from tests.store.scene import ERROR, SHA256, at_once, claimed, feed, lapse, now, running, submitted

STUDENT = NewArtifact("student.safetensors", SHA256, 12, "application/octet-stream")

NO_ROOM = StorageFull("no room to write").as_dict()

FENCED: dict[str, Callable[[Connection, str, int], Any]] = {
    "heartbeat": lambda c, job, fence: lifecycle.heartbeat(c, job, fence, 30),
    "phase": lambda c, job, fence: lifecycle.phase(c, job, fence, "training"),
    "progress": lambda c, job, fence: lifecycle.progress(c, job, fence, {"percent": 1}),
    "event": lambda c, job, fence: events.append(c, job, fence, "warning", {}),
    "metric": lambda c, job, fence: metrics.record(c, job, fence, "student", step=1, epoch=1, values={"loss": 1}),
    "checkpoint": lambda c, job, fence: checkpoints.record(
        c, job, fence, step=1, sha256=SHA256, bytes=1, path="checkpoints/1"
    ),
}
ENDS: dict[str, Callable[[Connection, str, int], bool]] = {
    "released": lambda c, job, fence: lifecycle.release(c, job, fence, "drain"),
    "postponed": lambda c, job, fence: lifecycle.postpone(c, job, fence, NO_ROOM, 0),
    "succeeded": lambda c, job, fence: lifecycle.finish_succeeded(c, job, fence, {}, [STUDENT]),
    "failed": lambda c, job, fence: lifecycle.finish_failed(c, job, fence, ERROR, None),
    "retried later": lambda c, job, fence: lifecycle.finish_failed(c, job, fence, ERROR, 0),
    "cancelled": lifecycle.finish_cancelled,
}


def test_a_job_from_queue_to_proof(database: Database):
    job = submitted(database)
    claim = claimed(database, owner="host-7")
    assert (claim.job.id, claim.fence, claim.attempts_without_progress, claim.takeover) == (job.id, 1, 1, False)
    with database.begin() as connection:
        lifecycle.phase(connection, job.id, 1, "training")
        lifecycle.progress(connection, job.id, 1, {"percent": 40})
        assert lifecycle.finish_succeeded(connection, job.id, 1, {"gain": 0.02}, [STUDENT])
    done = now(database, job.id)
    assert (done.status, done.result, done.progress) == ("succeeded", {"gain": 0.02}, {"percent": 40})
    assert done.owner is done.lease_until is done.phase is None
    assert done.created_at <= done.started_at <= done.finished_at
    assert feed(database, job.id) == ["queued", "claimed", "phase", "succeeded"]
    with database.connect() as connection:
        assert [artifact.name for artifact in artifacts.list(connection, job.id)] == ["student.safetensors"]
        (attempt,) = attempts.list(connection, job.id)
    assert (attempt.owner, attempt.how) == ("host-7", "succeeded")


def test_the_urgent_come_first_then_the_old(database: Database):
    old, young, urgent = submitted(database), submitted(database), submitted(database, priority=1)
    assert [claimed(database).job.id for _ in range(3)] == [urgent.id, old.id, young.id]


def test_an_empty_queue_gives_nothing_and_looking_says_so(database: Database):
    with database.begin() as connection:
        assert lifecycle.claim(connection, "worker", 30, rescue=True) is None
    with database.connect() as connection:
        assert not lifecycle.peek(connection, rescue=True)
    submitted(database)
    with database.connect() as connection:
        assert lifecycle.peek(connection, rescue=False)


def test_racing_claims_give_every_job_one_owner(database: Database):
    expected = {submitted(database).id for _ in range(12)}
    numbers = count()

    def drain() -> list[str]:
        mine = []
        while True:
            with database.begin() as connection:
                claim = lifecycle.claim(connection, f"worker {next(numbers)}", 30, rescue=True)
            if claim is None:
                return mine
            mine.append(claim.job.id)

    taken = [job_id for share in at_once([drain] * 6) for job_id in share]
    assert sorted(taken) == sorted(expected)
    assert all(now(database, job_id).fence == 1 for job_id in expected)


@pytest.mark.parametrize("write", FENCED.values(), ids=FENCED)
def test_whoever_lost_the_job_is_refused_every_write(database: Database, write: Callable[..., Any]):
    stale = running(database)
    lapse(database, stale.job.id)
    fresh = claimed(database, rescue=True)
    assert (fresh.fence, fresh.takeover) == (stale.fence + 1, True)
    told = feed(database, stale.job.id)
    with pytest.raises(LeaseLost, match=f"attempt 1 no longer owns job {stale.job.id}"), database.begin() as connection:
        write(connection, stale.job.id, stale.fence)
    assert feed(database, stale.job.id) == told
    with database.begin() as connection:
        write(connection, fresh.job.id, fresh.fence)


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_whoever_lost_the_job_cannot_end_it(database: Database, end: Callable[..., bool]):
    stale = running(database)
    lapse(database, stale.job.id)
    claimed(database, rescue=True)
    before = now(database, stale.job.id)
    with database.begin() as connection:
        assert not end(connection, stale.job.id, stale.fence)
    assert now(database, stale.job.id) == before


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_end_whose_answer_was_lost_may_be_told_again(database: Database, end: Callable[..., bool]):
    claim = running(database)
    with database.begin() as connection:
        assert end(connection, claim.job.id, claim.fence)
    told = feed(database, claim.job.id)
    with database.begin() as connection:
        assert end(connection, claim.job.id, claim.fence)
    assert feed(database, claim.job.id) == told


@pytest.mark.parametrize(("requested", "granted"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_a_wish_that_an_attempts_failure_granted_is_told_again(
    database: Database, requested: Callable[..., Any], granted: str
):
    claim = running(database)
    with database.begin() as connection:
        requested(connection, claim.job.id)
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
    assert feed(database, claim.job.id)[-2:] == [f"{requested.__name__}_requested", granted]


def test_another_end_than_the_one_that_stands_is_refused(database: Database):
    claim = running(database)
    with database.begin() as connection:
        lifecycle.finish_cancelled(connection, claim.job.id, claim.fence)
        assert not lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, [STUDENT])
        assert not lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, None)
        assert list(artifacts.list(connection, claim.job.id)) == []


def test_a_lapsed_lease_is_rescued_only_when_asked(database: Database):
    claim = running(database)
    lapse(database, claim.job.id)
    with database.begin() as connection:
        assert not lifecycle.peek(connection, rescue=False)
        assert lifecycle.claim(connection, "impatient", 30, rescue=False) is None
        assert lifecycle.peek(connection, rescue=True)
    assert now(database, claim.job.id).owner == "worker"


def test_an_owner_that_comes_back_before_anybody_claimed_keeps_its_job(database: Database):
    claim = running(database)
    lapse(database, claim.job.id)
    with database.begin() as connection:
        assert lifecycle.heartbeat(connection, claim.job.id, claim.fence, 30) is None
        assert lifecycle.claim(connection, "another", 30, rescue=True) is None


def test_a_heartbeat_extends_the_lease_and_brings_the_wish(database: Database):
    claim = running(database)
    with database.begin() as connection:
        assert lifecycle.heartbeat(connection, claim.job.id, claim.fence, 500) is None
        jobs.cancel(connection, claim.job.id)
        assert lifecycle.heartbeat(connection, claim.job.id, claim.fence, 500) == "cancel"
    assert now(database, claim.job.id).lease_until > claim.job.lease_until + 400


def test_a_drained_job_waits_again_with_its_attempt_unspent(database: Database):
    claim = running(database)
    with database.begin() as connection:
        assert lifecycle.release(connection, claim.job.id, claim.fence, "the worker stops")
    job = now(database, claim.job.id)
    assert (job.status, job.attempts_without_progress, job.owner, job.lease_until) == ("queued", 0, None, None)
    assert feed(database, job.id)[-1] == "released"
    assert (claimed(database).fence, claimed_attempts(database, job.id)) == (2, ["released", None])


def test_a_postponed_job_says_why_it_waits_and_its_attempt_is_unspent(database: Database):
    claim = running(database, max_attempts=1)
    with database.begin() as connection:
        assert lifecycle.postpone(connection, claim.job.id, claim.fence, NO_ROOM, 60)
    job = now(database, claim.job.id)
    assert (job.status, job.attempts_without_progress, job.error) == ("queued", 0, NO_ROOM)
    with database.connect() as connection:
        assert not lifecycle.peek(connection, rescue=True), "not before its time"
        told = events.after(connection, job.id, 2, 1)[0]
    assert (told.type, told.data) == ("released", {"reason": "storage_full", "error": NO_ROOM})


@pytest.mark.parametrize(("ask", "status"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_a_wish_that_came_while_draining_is_granted(database: Database, ask: Callable[..., Any], status: str):
    claim = running(database)
    with database.begin() as connection:
        ask(connection, claim.job.id)
        assert lifecycle.release(connection, claim.job.id, claim.fence, "the worker stops")
    job = now(database, claim.job.id)
    assert (job.status, job.requested, job.finished_at is not None) == (status, None, status == "cancelled")
    assert feed(database, job.id)[-1] == status


def test_a_failure_worth_a_retry_waits_before_it_is_tried_again(database: Database):
    claim = running(database)
    with database.begin() as connection:
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 3600)
        assert lifecycle.claim(connection, "eager", 30, rescue=True) is None
    job = now(database, claim.job.id)
    assert (job.status, job.error, job.attempts_without_progress) == ("queued", ERROR, 1)
    due(database, job.id)
    assert claimed(database).attempts_without_progress == 2


def test_the_error_of_the_attempt_before_is_not_that_of_the_one_at_work(database: Database):
    claim = running(database)
    with database.begin() as connection:
        lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
    assert now(database, claim.job.id).error == ERROR
    assert claimed(database).job.error is None


def test_the_last_attempt_fails_for_good_even_if_a_retry_was_meant(database: Database):
    claim = running(database, max_attempts=1)
    with database.begin() as connection:
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
    job = now(database, claim.job.id)
    assert (job.status, job.error) == ("failed", ERROR)


def test_a_job_that_kills_its_workers_is_given_up(database: Database):
    claim = running(database, max_attempts=2)
    lapse(database, claim.job.id)
    claimed(database, rescue=True)
    lapse(database, claim.job.id)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "third", 30, rescue=True) is None
        lifecycle.sweep(connection, rescue=True)
    job = now(database, claim.job.id)
    assert (job.status, job.error["code"], job.error["retryable"]) == ("failed", "worker_lost", True)
    assert claimed_attempts(database, job.id) == ["lost", "lost"]


def test_an_attempt_that_got_somewhere_gives_the_budget_back(database: Database):
    """max_attempts 1 and three lost workers: only the one that left no later checkpoint costs the job its life."""
    claim = running(database, max_attempts=1)
    for step in (10, 20):
        with database.begin() as connection:
            checkpoints.record(connection, claim.job.id, claim.fence, step=step, sha256=SHA256, bytes=1, path="x")
        lapse(database, claim.job.id)
        claim = claimed(database, rescue=True)
        assert (claim.attempts_without_progress, claim.checkpoints[0].step) == (1, step)
    lapse(database, claim.job.id)
    with database.begin() as connection:
        assert not lifecycle.peek(connection, rescue=True)
        lifecycle.sweep(connection, rescue=True)
    assert now(database, claim.job.id).status == "failed"


@pytest.mark.parametrize(("ask", "status"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_the_sweep_grants_the_wish_of_a_job_whose_worker_is_gone(
    database: Database, ask: Callable[..., Any], status: str
):
    claim = running(database)
    with database.begin() as connection:
        ask(connection, claim.job.id)
    lapse(database, claim.job.id)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "another", 30, rescue=True) is None
        lifecycle.sweep(connection, rescue=False)
    assert now(database, claim.job.id).status == "running"
    with database.begin() as connection:
        lifecycle.sweep(connection, rescue=True)
    job = now(database, claim.job.id)
    assert (job.status, job.fence, job.requested) == (status, claim.fence + 1, None)


@pytest.mark.parametrize("status", ["queued", "paused"])
def test_who_waits_past_the_deadline_fails_and_is_never_claimed(database: Database, status: str):
    job = submitted(database, deadline_s=-1)
    with database.begin() as connection:
        if status == "paused":
            jobs.pause(connection, job.id)
        assert lifecycle.claim(connection, "worker", 30, rescue=True) is None
        lifecycle.sweep(connection, rescue=False)
    late = now(database, job.id)
    assert (late.status, late.error["code"], late.finished_at is None) == ("failed", "deadline_exceeded", False)
    assert feed(database, job.id)[-1] == "failed"


def test_past_its_deadline_a_job_of_a_living_owner_is_left_to_it(database: Database):
    """It may be about to finish. Once the owner is gone, the sweep says it."""
    claim = running(database, deadline_s=60)
    with database.begin() as connection:
        connection.execute(update(job_rows).values(deadline_at=0))
        lifecycle.sweep(connection, rescue=True)
    assert now(database, claim.job.id).status == "running"
    lapse(database, claim.job.id)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "another", 30, rescue=True) is None
        lifecycle.sweep(connection, rescue=True)
    job = now(database, claim.job.id)
    assert (job.status, job.error["code"], job.fence) == ("failed", "deadline_exceeded", claim.fence + 1)
    assert claimed_attempts(database, job.id) == ["lost"]


def test_a_job_that_was_to_be_paused_is_given_up_where_no_attempt_is_left(database: Database):
    """Paused, and resumed one day, it would wait for ever."""
    claim = running(database, max_attempts=1)
    with database.begin() as connection:
        jobs.pause(connection, claim.job.id)
    lapse(database, claim.job.id)
    with database.begin() as connection:
        lifecycle.sweep(connection, rescue=True)
    job = now(database, claim.job.id)
    assert (job.status, job.requested, job.error["code"]) == ("failed", None, "worker_lost")


def test_sweeps_side_by_side_end_a_job_once(database: Database):
    claim = running(database, max_attempts=1)
    lapse(database, claim.job.id)

    def sweep() -> list[str]:
        with database.begin() as connection:
            return lifecycle.sweep(connection, rescue=True)

    assert at_once([sweep] * 4) == [[]] * 4
    assert feed(database, claim.job.id).count("failed") == 1


def test_the_sweep_names_what_has_waited_in_silence(database: Database):
    job = submitted(database)
    with database.begin() as connection:
        assert lifecycle.sweep(connection, rescue=False, rering_s=3600) == []
        assert lifecycle.sweep(connection, rescue=False, rering_s=-1) == [job.id]


def test_cancel_and_finish_race_and_the_first_writer_wins(database: Database):
    for _ in range(10):
        claim = running(database)
        job_id = claim.job.id

        def finish(job_id: str = job_id, fence: int = claim.fence) -> bool:
            with database.begin() as connection:
                return lifecycle.finish_succeeded(connection, job_id, fence, {}, [])

        def cancel(job_id: str = job_id) -> bool:
            with database.begin() as connection:
                return jobs.cancel(connection, job_id).requested == "cancel"

        finished, _ = at_once([finish, cancel])
        assert finished is True
        assert now(database, job_id).status == "succeeded"
        assert feed(database, job_id)[-1] == "succeeded"


def test_cancel_and_claim_race_and_what_was_cancelled_never_runs(database: Database):
    for _ in range(10):
        job_id = submitted(database).id

        def claim() -> bool:
            with database.begin() as connection:
                return lifecycle.claim(connection, "worker", 30, rescue=False) is not None

        def cancel(job_id: str = job_id) -> str:
            with database.begin() as connection:
                return jobs.cancel(connection, job_id).status

        ran, answer = at_once([claim, cancel])
        job = now(database, job_id)
        assert (ran, answer, job.status) in [(True, "running", "running"), (False, "cancelled", "cancelled")]
        assert "claimed" not in feed(database, job_id) or answer == "running"
        if ran:
            with database.begin() as connection:
                lifecycle.finish_cancelled(connection, job_id, 1)


def claimed_attempts(database: Database, job_id: str) -> list[str | None]:
    with database.connect() as connection:
        return [attempt.how for attempt in attempts.list(connection, job_id)]


def due(database: Database, job_id: str) -> None:
    with database.begin() as connection:
        connection.execute(update(job_rows).where(job_rows.c.id == job_id).values(not_before=0))
