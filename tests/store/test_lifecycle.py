from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from sqlalchemy import Connection, event

from base.errors import StorageFull
from store import artifacts, attempts, checkpoints, events, jobs, lifecycle, metrics, registry
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import LeaseLost
from tests.clock import SettableClock
from tests.store.helpers import (
    ERROR,
    LEASE_S,
    SHA256,
    WARNING,
    claimed,
    event_types,
    read_job,
    run_concurrently,
    running,
    submitted,
)

STUDENT = NewArtifact("student.safetensors", SHA256, 12, "application/octet-stream")

DISK_FULL = StorageFull("no disk space").as_dict()

CHECK = {
    "accuracy": 0.7, "interval": [0.6, 0.8], "images": 100, "test_samples": 1000, "dropped": 0.1, "warnings": [],
}  # fmt: skip

FENCED: dict[str, Callable[[Connection, str, int], Any]] = {
    "heartbeat": lambda c, job, fence: lifecycle.heartbeat(c, job, fence, 30),
    "phase": lambda c, job, fence: lifecycle.set_phase(c, job, fence, "training"),
    "progress": lambda c, job, fence: lifecycle.set_progress(c, job, fence, {"percent": 1}),
    "teacher_check": lambda c, job, fence: lifecycle.set_teacher_check(c, job, fence, CHECK, "f" * 64),
    "event": lambda c, job, fence: events.append_warning(c, job, fence, WARNING),
    "metric": lambda c, job, fence: metrics.record(c, job, fence, "student", step=1, epoch=1, values={"loss": 1}),
    "checkpoint": lambda c, job, fence: checkpoints.record(
        c, job, fence, step=1, sha256=SHA256, bytes=1, path="checkpoints/1"
    ),
}
ENDS: dict[str, Callable[[Connection, str, int], bool]] = {
    "released": lambda c, job, fence: lifecycle.release(c, job, fence, "drain"),
    "postponed": lambda c, job, fence: lifecycle.postpone(c, job, fence, DISK_FULL, 0),
    "succeeded": lambda c, job, fence: lifecycle.finish_succeeded(c, job, fence, {}, [STUDENT]),
    "failed": lambda c, job, fence: lifecycle.finish_failed(c, job, fence, ERROR, None),
    "failed, retry": lambda c, job, fence: lifecycle.finish_failed(c, job, fence, ERROR, 0),
    "cancelled": lifecycle.finish_cancelled,
}


def is_takeover(database: Database, claim: lifecycle.Claim) -> bool:
    """Return what the event of this claim has recorded."""
    with database.connect() as connection:
        (event,) = events.list_events(connection, claim.job.id, claim.job.event_seq - 1, 1)
    assert event.type == "claimed"
    takeover: bool = event.data["takeover"]
    return takeover


def test_claim_to_finish_succeeded(database: Database):
    job = submitted(database)
    claim = claimed(database, owner="host-7")
    assert (claim.job.id, claim.fence, claim.job.attempts_without_progress) == (job.id, 1, 1)
    assert not is_takeover(database, claim)
    with database.begin() as connection:
        lifecycle.set_phase(connection, job.id, 1, "training")
        lifecycle.set_progress(connection, job.id, 1, {"percent": 40})
        assert lifecycle.finish_succeeded(connection, job.id, 1, {"gain": 0.02}, [STUDENT])
    job = read_job(database, job.id)
    assert (job.status, job.result, job.progress) == ("succeeded", {"gain": 0.02}, {"percent": 40})
    assert job.owner is job.lease_until is job.phase is None
    assert job.created_at <= job.started_at <= job.finished_at
    assert event_types(database, job.id) == ["queued", "claimed", "phase", "succeeded"]
    with database.connect() as connection:
        assert [artifact.name for artifact in artifacts.list_artifacts(connection, job.id)] == ["student.safetensors"]
        (attempt,) = attempts.list_attempts(connection, job.id)
    assert (attempt.owner, attempt.how) == ("host-7", "succeeded")


def test_claim_takes_by_priority_then_age(database: Database):
    old, young, urgent = submitted(database), submitted(database), submitted(database, priority=1)
    assert [claimed(database).job.id for _ in range(3)] == [urgent.id, old.id, young.id]


def test_claim_and_has_claimable_of_an_empty_queue(database: Database):
    with database.begin() as connection:
        assert lifecycle.claim(connection, "worker", 30, takeover=True) is None
    with database.connect() as connection:
        assert not lifecycle.has_claimable(connection, takeover=True)
    submitted(database)
    with database.connect() as connection:
        assert lifecycle.has_claimable(connection, takeover=False)


def test_claim_concurrently_gives_every_job_one_owner(database: Database):
    expected = {submitted(database).id for _ in range(12)}
    numbers = count()

    def drain() -> list[str]:
        claimed_ids = []
        while True:
            with database.begin() as connection:
                claim = lifecycle.claim(connection, f"worker {next(numbers)}", 30, takeover=True)
            if claim is None:
                return claimed_ids
            claimed_ids.append(claim.job.id)

    taken = [job_id for ids in run_concurrently([drain] * 6) for job_id in ids]
    assert sorted(taken) == sorted(expected)
    assert all(read_job(database, job_id).fence == 1 for job_id in expected)


@pytest.mark.parametrize("write", FENCED.values(), ids=FENCED)
def test_stale_attempt_is_refused_every_write(database: Database, clock: SettableClock, write: Callable[..., Any]):
    stale = running(database)
    clock.advance(LEASE_S + 1)
    fresh = claimed(database, takeover=True)
    assert fresh.fence == stale.fence + 1 and is_takeover(database, fresh)
    before = event_types(database, stale.job.id)
    with pytest.raises(LeaseLost, match=f"attempt 1 does not own job {stale.job.id}"), database.begin() as connection:
        write(connection, stale.job.id, stale.fence)
    assert event_types(database, stale.job.id) == before
    with database.begin() as connection:
        write(connection, fresh.job.id, fresh.fence)


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_stale_attempt_cannot_end_the_job(database: Database, clock: SettableClock, end: Callable[..., bool]):
    stale = running(database)
    clock.advance(LEASE_S + 1)
    claimed(database, takeover=True)
    before = read_job(database, stale.job.id)
    with database.begin() as connection:
        assert not end(connection, stale.job.id, stale.fence)
    assert read_job(database, stale.job.id) == before


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_every_end_is_idempotent(database: Database, end: Callable[..., bool]):
    claim = running(database)
    with database.begin() as connection:
        assert end(connection, claim.job.id, claim.fence)
    before = event_types(database, claim.job.id)
    with database.begin() as connection:
        assert end(connection, claim.job.id, claim.fence)
    assert event_types(database, claim.job.id) == before


@pytest.mark.parametrize(("action", "status"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_finish_failed_with_a_request_is_idempotent(database: Database, action: Callable[..., Any], status: str):
    claim = running(database)
    with database.begin() as connection:
        action(connection, claim.job.id)
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
    assert event_types(database, claim.job.id)[-2:] == [f"{action.__name__}_requested", status]


def test_finish_after_another_finish_is_refused(database: Database):
    claim = running(database)
    with database.begin() as connection:
        lifecycle.finish_cancelled(connection, claim.job.id, claim.fence)
        assert not lifecycle.finish_succeeded(connection, claim.job.id, claim.fence, {}, [STUDENT])
        assert not lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, None)
        assert list(artifacts.list_artifacts(connection, claim.job.id)) == []


def test_claim_takes_over_an_expired_lease_only_with_takeover(database: Database, clock: SettableClock):
    claim = running(database)
    clock.advance(LEASE_S + 1)
    with database.begin() as connection:
        assert not lifecycle.has_claimable(connection, takeover=False)
        assert lifecycle.claim(connection, "another", 30, takeover=False) is None
        assert lifecycle.has_claimable(connection, takeover=True)
    assert read_job(database, claim.job.id).owner == "worker"


def test_heartbeat_after_the_lease_expired_keeps_an_unclaimed_job(database: Database, clock: SettableClock):
    claim = running(database)
    clock.advance(LEASE_S + 1)
    with database.begin() as connection:
        assert lifecycle.heartbeat(connection, claim.job.id, claim.fence, 30) is None
        assert lifecycle.claim(connection, "another", 30, takeover=True) is None


def test_heartbeat_extends_the_lease_and_returns_the_request(database: Database):
    claim = running(database)
    with database.begin() as connection:
        assert lifecycle.heartbeat(connection, claim.job.id, claim.fence, 500) is None
        jobs.cancel(connection, claim.job.id)
        assert lifecycle.heartbeat(connection, claim.job.id, claim.fence, 500) == "cancel"
    assert read_job(database, claim.job.id).lease_until > claim.job.lease_until + 400


def test_release_queues_the_job_without_spending_the_attempt(database: Database):
    claim = running(database)
    with database.begin() as connection:
        assert lifecycle.release(connection, claim.job.id, claim.fence, "the worker stops")
    job = read_job(database, claim.job.id)
    assert (job.status, job.attempts_without_progress, job.owner, job.lease_until) == ("queued", 0, None, None)
    assert event_types(database, job.id)[-1] == "released"
    assert (claimed(database).fence, attempt_ends(database, job.id)) == (2, ["released", None])


def test_postpone_queues_the_job_for_later_with_its_error(database: Database):
    claim = running(database, max_attempts=1)
    with database.begin() as connection:
        assert lifecycle.postpone(connection, claim.job.id, claim.fence, DISK_FULL, 60)
    job = read_job(database, claim.job.id)
    assert (job.status, job.attempts_without_progress, job.error) == ("queued", 0, DISK_FULL)
    with database.connect() as connection:
        assert not lifecycle.has_claimable(connection, takeover=True), "not before its time"
        event = events.list_events(connection, job.id, 2, 1)[0]
    assert (event.type, event.data) == ("released", {"reason": "storage_full", "error": DISK_FULL})


@pytest.mark.parametrize(("action", "status"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_release_after_a_request_takes_the_requested_status(
    database: Database, action: Callable[..., Any], status: str
):
    claim = running(database)
    with database.begin() as connection:
        action(connection, claim.job.id)
        assert lifecycle.release(connection, claim.job.id, claim.fence, "the worker stops")
    job = read_job(database, claim.job.id)
    assert (job.status, job.requested, job.finished_at is not None) == (status, None, status == "cancelled")
    assert event_types(database, job.id)[-1] == status


def test_finish_failed_with_a_retry_waits_before_the_next_attempt(database: Database, clock: SettableClock):
    claim = running(database)
    with database.begin() as connection:
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 3600)
    clock.advance(3590)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "worker", LEASE_S, takeover=True) is None
    job = read_job(database, claim.job.id)
    assert (job.status, job.error, job.attempts_without_progress) == ("queued", ERROR, 1)
    clock.advance(10)
    assert claimed(database).job.attempts_without_progress == 2


def test_claim_clears_the_error_of_the_attempt_before(database: Database):
    claim = running(database)
    with database.begin() as connection:
        lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
    assert read_job(database, claim.job.id).error == ERROR
    assert claimed(database).job.error is None


def test_finish_failed_of_the_last_attempt_is_final(database: Database):
    claim = running(database, max_attempts=1)
    with database.begin() as connection:
        assert lifecycle.finish_failed(connection, claim.job.id, claim.fence, ERROR, 0)
    job = read_job(database, claim.job.id)
    assert (job.status, job.error) == ("failed", ERROR)


def test_sweep_fails_a_job_without_attempts_as_worker_lost(database: Database, clock: SettableClock):
    claim = running(database, max_attempts=2)
    clock.advance(LEASE_S + 1)
    claimed(database, takeover=True)
    clock.advance(LEASE_S + 1)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "third", 30, takeover=True) is None
        lifecycle.sweep(connection, takeover=True)
    job = read_job(database, claim.job.id)
    assert (job.status, job.error["code"], job.error["retryable"]) == ("failed", "worker_lost", True)
    assert attempt_ends(database, job.id) == ["lost", "lost"]


def test_claim_after_progress_restores_the_attempts(database: Database, clock: SettableClock):
    """max_attempts 1 and three lost workers: the job fails after the one that wrote no later checkpoint."""
    claim = running(database, max_attempts=1)
    for step in (10, 20):
        with database.begin() as connection:
            checkpoints.record(connection, claim.job.id, claim.fence, step=step, sha256=SHA256, bytes=1, path="x")
        clock.advance(LEASE_S + 1)
        claim = claimed(database, takeover=True)
        assert (claim.job.attempts_without_progress, claim.checkpoints[0].step) == (1, step)
    clock.advance(LEASE_S + 1)
    with database.begin() as connection:
        assert not lifecycle.has_claimable(connection, takeover=True)
        lifecycle.sweep(connection, takeover=True)
    assert read_job(database, claim.job.id).status == "failed"


@pytest.mark.parametrize(("action", "status"), [(jobs.cancel, "cancelled"), (jobs.pause, "paused")])
def test_sweep_ends_a_job_with_a_request_and_an_expired_lease(
    database: Database, clock: SettableClock, action: Callable[..., Any], status: str
):
    claim = running(database)
    with database.begin() as connection:
        action(connection, claim.job.id)
    clock.advance(LEASE_S + 1)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "another", 30, takeover=True) is None
        lifecycle.sweep(connection, takeover=False)
    assert read_job(database, claim.job.id).status == "running"
    with database.begin() as connection:
        lifecycle.sweep(connection, takeover=True)
    job = read_job(database, claim.job.id)
    assert (job.status, job.fence, job.requested) == (status, claim.fence + 1, None)


@pytest.mark.parametrize("status", ["queued", "paused"])
def test_sweep_fails_a_waiting_job_past_its_deadline(database: Database, clock: SettableClock, status: str):
    job = submitted(database, deadline_s=60)
    with database.begin() as connection:
        if status == "paused":
            jobs.pause(connection, job.id)
        lifecycle.sweep(connection, takeover=False)
    assert read_job(database, job.id).status == status
    clock.advance(61)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "worker", LEASE_S, takeover=True) is None
        lifecycle.sweep(connection, takeover=False)
    failed = read_job(database, job.id)
    assert (failed.status, failed.error["code"], failed.finished_at is None) == ("failed", "deadline_exceeded", False)
    assert event_types(database, job.id)[-1] == "failed"


def test_sweep_leaves_a_job_past_its_deadline_to_its_owner(database: Database, clock: SettableClock):
    """The job may be about to finish. Once its lease has expired, the sweep fails it."""
    claim = running(database, deadline_s=20)
    clock.advance(LEASE_S - 5)
    with database.begin() as connection:
        lifecycle.sweep(connection, takeover=True)
    assert read_job(database, claim.job.id).status == "running"
    clock.advance(10)
    with database.begin() as connection:
        assert lifecycle.claim(connection, "another", LEASE_S, takeover=True) is None
        lifecycle.sweep(connection, takeover=True)
    job = read_job(database, claim.job.id)
    assert (job.status, job.error["code"], job.fence) == ("failed", "deadline_exceeded", claim.fence + 1)
    assert attempt_ends(database, job.id) == ["lost"]


def test_sweep_fails_a_job_to_be_paused_without_attempts(database: Database, clock: SettableClock):
    """Paused and resumed, it would wait for ever."""
    claim = running(database, max_attempts=1)
    with database.begin() as connection:
        jobs.pause(connection, claim.job.id)
    clock.advance(LEASE_S + 1)
    with database.begin() as connection:
        lifecycle.sweep(connection, takeover=True)
    job = read_job(database, claim.job.id)
    assert (job.status, job.requested, job.error["code"]) == ("failed", None, "worker_lost")


def test_sweep_concurrently_ends_a_job_once(database: Database, clock: SettableClock):
    claim = running(database, max_attempts=1)
    clock.advance(LEASE_S + 1)

    def sweep() -> list[str]:
        with database.begin() as connection:
            return lifecycle.sweep(connection, takeover=True)

    assert run_concurrently([sweep] * 4) == [[]] * 4
    assert event_types(database, claim.job.id).count("failed") == 1


def test_sweep_returns_jobs_whose_wake_up_was_lost(database: Database, clock: SettableClock):
    job = submitted(database)
    with database.begin() as connection:
        assert lifecycle.sweep(connection, takeover=False, rering_s=15) == []
    clock.advance(16)
    with database.begin() as connection:
        assert lifecycle.sweep(connection, takeover=False, rering_s=15) == [job.id]


def test_finish_succeeded_and_cancel_concurrently(database: Database):
    for _ in range(10):
        claim = running(database)
        job_id = claim.job.id

        def finish(job_id: str = job_id, fence: int = claim.fence) -> bool:
            with database.begin() as connection:
                return lifecycle.finish_succeeded(connection, job_id, fence, {}, [])

        def cancel(job_id: str = job_id) -> bool:
            with database.begin() as connection:
                return jobs.cancel(connection, job_id).requested == "cancel"

        finished, _ = run_concurrently([finish, cancel])
        assert finished is True
        assert read_job(database, job_id).status == "succeeded"
        assert event_types(database, job_id)[-1] == "succeeded"


def test_claim_and_cancel_concurrently(database: Database):
    for _ in range(10):
        job_id = submitted(database).id

        def claim() -> bool:
            with database.begin() as connection:
                return lifecycle.claim(connection, "worker", 30, takeover=False) is not None

        def cancel(job_id: str = job_id) -> str:
            with database.begin() as connection:
                return jobs.cancel(connection, job_id).status

        was_claimed, answer = run_concurrently([claim, cancel])
        job = read_job(database, job_id)
        assert (was_claimed, answer, job.status) in [(True, "running", "running"), (False, "cancelled", "cancelled")]
        assert ("claimed" in event_types(database, job_id)) == was_claimed
        if was_claimed:
            with database.begin() as connection:
                lifecycle.finish_cancelled(connection, job_id, 1)


def attempt_ends(database: Database, job_id: str) -> list[str | None]:
    with database.connect() as connection:
        return [attempt.how for attempt in attempts.list_attempts(connection, job_id)]


def test_set_teacher_check_is_kept_with_the_job_its_events_and_for_the_project(database: Database):
    claim = running(database, project="ours")
    with database.begin() as connection:
        lifecycle.set_teacher_check(connection, claim.job.id, claim.fence, CHECK, "a" * 64)
    job = read_job(database, claim.job.id)
    shown = {name: value for name, value in CHECK.items() if name != "warnings"}
    assert job.teacher_check == shown
    with database.connect() as connection:
        event = events.list_events(connection, job.id, job.event_seq - 1, 1)[0]
        assert (event.type, event.data) == ("teacher_check", shown)
        assert registry.get_measurement(connection, "ours", "evaluation", "a" * 64) == CHECK
        assert registry.get_measurement(connection, "theirs", "evaluation", "a" * 64) is None


def test_set_teacher_check_again_adds_no_event(database: Database):
    claim = running(database)
    for check in (CHECK, CHECK, {**CHECK, "accuracy": 0.71}):
        with database.begin() as connection:
            lifecycle.set_teacher_check(connection, claim.job.id, claim.fence, check, None)
    assert event_types(database, claim.job.id).count("teacher_check") == 2


def test_set_teacher_check_of_a_lost_job_keeps_nothing(database: Database):
    claim = running(database)
    with pytest.raises(LeaseLost), database.begin() as connection:
        lifecycle.set_teacher_check(connection, claim.job.id, claim.fence + 1, CHECK, "a" * 64)
    with database.connect() as connection:
        assert registry.get_measurement(connection, "ours", "evaluation", "a" * 64) is None


def test_queue_is_read_from_its_index(sqlite_database_url: str):
    """At 60,000 jobs a poll that reads all of them takes 41 ms, and one that reads the queue 1 ms."""
    database = Database(sqlite_database_url)
    statements: list[str] = []
    with database.begin() as connection:
        event.listen(connection, "before_cursor_execute", lambda *args: statements.append(args[2]))
        lifecycle.claim(connection, "worker", LEASE_S, takeover=False)
        lifecycle.sweep(connection, takeover=False)
        queries = [one for one in statements if "ORDER BY" in one and "priority" in one]
        plans = [
            connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {one}", (0,) * one.count("?")).all() for one in queries
        ]
    assert len(plans) == 2
    assert all("ix_jobs_waiting" in str(plan) for plan in plans)
    database.dispose()
