"""Random transitions by clients and by owners of any age: the store must return and hold what the model does.

DISTILLERY_TEST_LIVES=5000 pytest tests/store/test_state_machine.py      runs that many sequences, others each time
"""

import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from store import checkpoints, events, jobs, lifecycle, metrics
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import StoreError
from store.lifecycle import Claim
from store.records import Job, NewJob
from tests.clock import SettableClock
from tests.store.helpers import ERROR, SHA256, WARNING, expire_lease, new_job
from tests.store.model import DEADLINE, ENDED, LEASE, RERING, UNAVAILABLE, WAIT, Model, ModelJob

T = TypeVar("T")

UNIT_S = 10_000
"""One unit of the model's time: very long in comparison with the real duration of a sequence."""
SEQUENCES = {"sqlite": 110, "postgres": 30}
MOVES = 30
MAX_OPEN_JOBS = 3
"""Jobs that have not ended: few, so that many moves concern the same job."""

NEVER = {
    "runs without lease or owner, or has one and does not run": """
        SELECT id FROM jobs WHERE (status = 'running') <> (lease_until IS NOT NULL)
                               OR (status = 'running') <> (owner IS NOT NULL)""",
    "has a request, and does not run": "SELECT id FROM jobs WHERE requested IS NOT NULL AND status <> 'running'",
    "has ended without finished_at, or has it and has not ended": """
        SELECT id FROM jobs WHERE (status IN ('succeeded', 'failed', 'cancelled')) <> (finished_at IS NOT NULL)""",
    "has spent more attempts than it has": """
        SELECT id FROM jobs WHERE attempts_without_progress > max_attempts OR attempts_without_progress < 0""",
    "waits without an attempt left": """
        SELECT id FROM jobs WHERE status IN ('queued', 'paused') AND attempts_without_progress >= max_attempts
                              AND coalesce(checkpoint_step, -1) <= coalesce(claimed_step, -1)""",
    "has an open attempt other than its latest": """
        SELECT id FROM jobs JOIN job_attempts a ON job_id = id
        WHERE ended_at IS NULL AND NOT (status = 'running' AND a.fence = jobs.fence)""",
    "runs in no attempt": """
        SELECT id FROM jobs WHERE status = 'running' AND NOT EXISTS (
            SELECT 1 FROM job_attempts a WHERE job_id = id AND a.fence = jobs.fence AND ended_at IS NULL)""",
    "has artifacts without success, or of another attempt": """
        SELECT id FROM jobs JOIN artifacts ON job_id = id WHERE status <> 'succeeded' OR bytes <> fence""",
    "waits for a job that has ended": """
        SELECT w.id FROM jobs w JOIN job_teachers ON job_id = w.id LEFT JOIN jobs t ON t.id = teacher_job_id
        WHERE w.status IN ('queued', 'paused') AND coalesce(t.status, 'failed') IN ('succeeded', 'failed', 'cancelled')
           OR w.status IN ('running', 'succeeded')""",
    "succeeded with an error": "SELECT id FROM jobs WHERE status = 'succeeded' AND error IS NOT NULL",
    "has a gap in its events": """
        SELECT id FROM jobs LEFT JOIN job_events ON job_id = id GROUP BY id, event_seq
        HAVING count(seq) <> event_seq OR min(seq) <> 1 OR max(seq) <> event_seq""",
    "has a checkpoint beyond checkpoint_step": """
        SELECT id FROM jobs JOIN checkpoints ON job_id = id WHERE step > coalesce(checkpoint_step, -1)""",
}
"""Queries for jobs in a state that must not occur. The size of a test's artifact is its writer's fence."""
VIOLATIONS = " UNION ALL ".join(f"SELECT '{what}', id FROM ({rows}) AS violating" for what, rows in NEVER.items())  # noqa: S608

JOBS = """
    SELECT id, status, requested, fence, attempts_without_progress, checkpoint_step, claimed_step, error ->> 'code'
    FROM jobs"""
EVENTS = """
    SELECT job_id, type, CAST(coalesce(
        data ->> 'author', data -> 'error' ->> 'author', data -> 'artifacts' -> 0 ->> 'bytes', data ->> 'attempt',
        CASE WHEN type = 'checkpoint' THEN data ->> 'bytes' END
    ) AS INTEGER) FROM job_events ORDER BY job_id, seq"""
"""With the fence of the attempt that caused the event, which the test leaves in its data; NULL for a client's."""
OTHER_TABLES = {
    "job_attempts": "SELECT job_id, fence, how FROM job_attempts",
    "checkpoints": "SELECT job_id, step, fence FROM checkpoints",
    "metrics": "SELECT job_id, step, value FROM metrics",
    "artifacts": "SELECT job_id, bytes FROM artifacts",
}

STEPS = st.integers(1, 6)
WRITE_NAMES = st.sampled_from(
    ["heartbeat", "set_phase", "set_progress", "append_warning", "metric", "checkpoint", "checkpoint", "checkpoint"]
)
AGES = st.integers(0, 3)
"""Jobs and claims are chosen by age: 0 is the newest."""
DEADLINES = st.sampled_from([None, DEADLINE])

WRITES: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "heartbeat": (
        lambda c, job, fence, step: lifecycle.heartbeat(c, job, fence, LEASE * UNIT_S),
        lambda model, job, fence, step: model.heartbeat(job, fence),
    ),
    "set_phase": (
        lambda c, job, fence, step: lifecycle.set_phase(c, job, fence, "training"),
        lambda model, job, fence, step: model.write(job, fence, "phase"),
    ),
    "set_progress": (
        lambda c, job, fence, step: lifecycle.set_progress(c, job, fence, {"step": step}),
        lambda model, job, fence, step: model.write(job, fence, None),
    ),
    "append_warning": (
        # `more` makes an event each time.
        lambda c, job, fence, step: events.append_warning(c, job, fence, WARNING, {"author": fence}),
        lambda model, job, fence, step: model.write(job, fence, "warning"),
    ),
    "metric": (
        lambda c, job, fence, step: metrics.record(
            c, job, fence, "student", step=step, epoch=None, values={"author": fence}
        ),
        lambda model, job, fence, step: model.metric(job, fence, step),
    ),
    "checkpoint": (
        lambda c, job, fence, step: checkpoints.record(
            c, job, fence, step=step, sha256=SHA256, bytes=fence, path=f"{fence}/{step}.pt"
        ),
        lambda model, job, fence, step: model.checkpoint(job, fence, step),
    ),
}
"""The writes of an attempt while it trains, to the store and to the model. Each leaves its fence in its data."""

ENDS: dict[str, tuple[Callable[..., bool], Callable[..., bool]]] = {
    "succeed": (
        lambda c, job, fence: lifecycle.finish_succeeded(c, job, fence, {}, [_student(fence)]),
        lambda model, job, fence: model.succeed(job, fence),
    ),
    "fail": (
        lambda c, job, fence: lifecycle.finish_failed(c, job, fence, _error(fence), None),
        lambda model, job, fence: model.fail(job, fence, None),
    ),
    "fail, retry at once": (
        lambda c, job, fence: lifecycle.finish_failed(c, job, fence, _error(fence), 0),
        lambda model, job, fence: model.fail(job, fence, 0),
    ),
    "fail, retry later": (
        lambda c, job, fence: lifecycle.finish_failed(c, job, fence, _error(fence), WAIT * UNIT_S),
        lambda model, job, fence: model.fail(job, fence, WAIT),
    ),
    "cancel": (lifecycle.finish_cancelled, lambda model, job, fence: model.finish_cancelled(job, fence)),
    "release": (
        lambda c, job, fence: lifecycle.release(c, job, fence, "drain"),
        lambda model, job, fence: model.release(job, fence, "queued"),
    ),
    "pause": (
        lambda c, job, fence: lifecycle.release(c, job, fence, "pause", "paused"),
        lambda model, job, fence: model.release(job, fence, "paused"),
    ),
    "postpone": (
        lambda c, job, fence: lifecycle.postpone(c, job, fence, _error(fence), WAIT * UNIT_S),
        lambda model, job, fence: model.release(job, fence, "queued", WAIT),
    ),
}


class StoreAndModel(RuleBasedStateMachine):
    """Makes each move in the store and in the model. An owner that has lost its job continues to write."""

    def __init__(self, database: Database, sql: Any, clock: SettableClock) -> None:
        super().__init__()
        self.database, self.sql, self.clock, self.model = database, sql, clock, Model()
        self.submitted: list[str] = []
        self.claims: list[Claim] = []
        self.fences: dict[str, int] = {}
        self.sql.execute("DELETE FROM jobs")

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the store's result, or the name of its error; for a job, its status."""
        try:
            with self.database.begin() as connection:
                result = function(connection, *args, **kwargs)
        except StoreError as error:
            return type(error).__name__
        return result.status if isinstance(result, Job) else result

    # ── clients ──

    @initialize(max_attempts=st.integers(1, 3), deadline=DEADLINES)
    def submit_two_and_claim_one(self, max_attempts: int, deadline: float | None) -> None:
        self.submit("a key", "5", 0, max_attempts, deadline)
        self.submit(None, "6", 1, max_attempts, None)
        self.claim(takeover=False)

    @precondition(lambda self: sum(job.status not in ENDED for job in self.model.jobs.values()) < MAX_OPEN_JOBS)
    @rule(
        key=st.sampled_from([None, "a key", "another"]),
        body=st.sampled_from(["5", "6"]),
        priority=st.integers(0, 1),
        max_attempts=st.integers(1, 3),
        deadline=DEADLINES,
        teacher_age=st.sampled_from([None, 0, 1]),
    )
    def submit(
        self,
        key: str | None,
        body: str,
        priority: int,
        max_attempts: int,
        deadline: float | None,
        teacher_age: int | None = None,
    ) -> None:
        teacher = None if teacher_age is None else _by_age(self.submitted, teacher_age)
        result = self.call(jobs.submit, _new_job(key, body, priority, max_attempts, deadline, teacher))
        expected = self.model.find_by_key(key, body)
        if expected is not None:
            assert (result if isinstance(result, str) else (result[0].id, result[1])) == expected
            return
        if not self.model.teaches(teacher):
            assert result == UNAVAILABLE
            return
        job, is_new = result
        assert is_new
        now = self.model.now
        self.submitted.append(job.id)
        new = ModelJob(
            id=job.id,
            key=key,
            body=body,
            priority=priority,
            max_attempts=max_attempts,
            deadline=deadline,
            submitted_at=now,
            created_at=job.created_at,
            deadline_at=None if deadline is None else now + deadline,
        )
        self.model.add(new, teacher)

    @rule(age=AGES, action=st.sampled_from(["cancel", "pause", "resume", "retry", "delete"]))
    def request(self, age: int, action: str) -> None:
        job_id = _by_age(self.submitted, age)
        assert self.call(getattr(jobs, action), job_id) == getattr(self.model, action)(job_id)

    @precondition(lambda self: self.model.resumable())
    @rule(from_scratch=st.booleans())
    def resume_or_retry(self, from_scratch: bool) -> None:
        """Queue the first job that no worker can continue."""
        job_id = self.model.resumable()[0]
        if self.model.jobs[job_id].status == "paused":
            assert self.call(jobs.resume, job_id) == self.model.resume(job_id)
        else:
            assert self.call(jobs.retry, job_id, from_scratch=from_scratch) == self.model.retry(job_id, from_scratch)

    # ── workers ──

    @precondition(lambda self: self.model.first_claimable(takeover=True) is not None)
    @rule(takeover=st.booleans())
    def claim(self, takeover: bool) -> None:
        claim = self.call(lifecycle.claim, "worker", LEASE * UNIT_S, takeover=takeover)
        expected = self.model.claim(takeover)
        if expected is None:
            assert claim is None
            return
        job, was_running = expected
        assert (claim.job.id, claim.fence) == (job.id, job.fence)
        (event,) = self.call(events.list_events, job.id, claim.job.event_seq - 1, 1)
        assert (event.type, event.data["takeover"]) == ("claimed", was_running)
        assert claim.job.attempts_without_progress == job.attempts_without_progress
        assert [(one.step, one.fence) for one in claim.checkpoints] == job.newest_checkpoints()
        self.claims.append(claim)

    @rule(age=AGES, write=WRITE_NAMES, step=STEPS)
    def write(self, age: int, write: str, step: int) -> None:
        claim, (store, model) = _by_age(self.claims, age), WRITES[write]
        result = self.call(store, claim.job.id, claim.fence, step)
        assert (result if isinstance(result, str) else None) == model(self.model, claim.job.id, claim.fence, step)

    @rule(age=AGES, end=st.sampled_from(list(ENDS)))
    def end(self, age: int, end: str) -> None:
        claim, (store, model) = _by_age(self.claims, age), ENDS[end]
        assert self.call(store, claim.job.id, claim.fence) == model(self.model, claim.job.id, claim.fence)

    @precondition(lambda self: self.model.first_claimable(takeover=True) is not None)
    @rule(takeover=st.booleans(), write=WRITE_NAMES, step=STEPS, end=st.sampled_from(list(ENDS)))
    def whole_attempt(self, takeover: bool, write: str, step: int, end: str) -> None:
        """Claim, write, end. If nothing could be claimed, the last owner writes and ends again."""
        self.claim(takeover)
        self.write(0, write, step)
        self.end(0, end)

    # ── time and sweep ──

    @rule(units=st.integers(1, 2))
    def time_passes(self, units: int) -> None:
        self.clock.advance(units * UNIT_S)
        self.model.now += units

    @precondition(lambda self: any(job.status == "running" for job in self.model.jobs.values()))
    @rule(age=AGES, taken_over=st.booleans())
    def lease_expires(self, age: int, taken_over: bool) -> None:
        job = _by_age([job for job in self.model.jobs.values() if job.status == "running"], age)
        job.lease_until = self.model.now - 0.5
        expire_lease(self.database, job.id)
        if taken_over:
            self.claim(takeover=True)

    @rule(takeover=st.booleans())
    def sweep(self, takeover: bool) -> None:
        result = self.call(lifecycle.sweep, takeover=takeover, rering_s=RERING * UNIT_S)
        assert result == self.model.sweep(takeover)
        has_claimable = self.model.first_claimable(takeover) is not None
        assert self.call(lifecycle.has_claimable, takeover) == has_claimable

    # ── invariants ──

    @invariant()
    def no_job_violates_a_rule(self) -> None:
        assert self.rows(VIOLATIONS) == []

    @invariant()
    def events_are_allowed_and_those_of_the_model(self) -> None:
        by_job: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
        for job_id, type, author in self.sql.execute(EVENTS):
            by_job[job_id].append((type, author))
        for job_events in by_job.values():
            _check_events(job_events)
        types = {job_id: [type for type, _ in job_events] for job_id, job_events in by_job.items()}
        assert types == {job.id: job.events for job in self.model.jobs.values()}

    @invariant()
    def rows_are_those_of_the_model(self) -> None:
        rows = self.rows(JOBS)
        assert rows == sorted(_row(job) for job in self.model.jobs.values())
        for table, expected in _other_rows(self.model).items():
            assert self.rows(OTHER_TABLES[table]) == sorted(expected)
        with self.database.connect() as connection:
            assert jobs.count_by_status(connection) == Counter(status for _, status, *_ in rows)

    @invariant()
    def no_fence_decreases(self) -> None:
        fences = dict(self.rows("SELECT id, fence FROM jobs"))
        assert all(fences.get(job_id, fence) >= fence for job_id, fence in self.fences.items())
        self.fences = fences

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return sorted(self.sql.execute(query))


def _row(job: ModelJob) -> tuple[Any, ...]:
    steps = (job.attempts_without_progress, job.checkpoint_step, job.claimed_step)
    return (job.id, job.status, job.requested, job.fence, *steps, job.error)


def _other_rows(model: Model) -> dict[str, list[tuple[Any, ...]]]:
    all_jobs = model.jobs.values()
    return {
        "job_attempts": [(job.id, *attempt) for job in all_jobs for attempt in job.attempts],
        "checkpoints": [(job.id, *checkpoint) for job in all_jobs for checkpoint in job.checkpoints],
        "metrics": [(job.id, *point) for job in all_jobs for point in job.metrics.items()],
        "artifacts": [(job.id, job.published_by) for job in all_jobs if job.published_by is not None],
    }


def _check_events(job_events: list[tuple[str, int | None]]) -> None:
    """One end until a retry; each claim has a higher fence; no event by an attempt other than the last to claim."""
    fence, ended = 0, False
    for type, author in job_events:
        assert ended == (type == "retried"), f"{type} happened {'after' if ended else 'before'} the end"
        ended = type in ENDED
        if type == "claimed":
            assert author is not None and author > fence
            fence = author
        assert author in (None, fence), f"{type} was written by an attempt that had lost the job"


def _by_age(items: list[T], age: int) -> T:
    return items[-1 - age % len(items)]


def _new_job(
    key: str | None, body: str, priority: int, max_attempts: int, deadline: float | None, teacher: str | None
) -> NewJob:
    return new_job(
        resolved_spec={"teacher": None if teacher is None else {"checkpoint": f"job:{teacher}"}},
        spec_sha256=body * 64,
        idempotency_key=key,
        priority=priority,
        max_attempts=max_attempts,
        deadline_s=None if deadline is None else deadline * UNIT_S,
    )


def _student(fence: int) -> NewArtifact:
    return NewArtifact("student.safetensors", SHA256, fence, "application/octet-stream")


def _error(fence: int) -> dict[str, Any]:
    return {**ERROR, "author": fence}


@contextmanager
def _connect(url: str) -> Iterator[Any]:
    """A connection that does not use the store's code."""
    if url.startswith("sqlite:///"):
        connection: Any = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute("PRAGMA foreign_keys = ON")
    else:
        connection = psycopg.connect(url, autocommit=True)
    with closing(connection):
        yield connection


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_store_does_what_the_model_does(kind: str, request: pytest.FixtureRequest, clock: SettableClock):
    url = request.getfixturevalue(f"{kind}_database_url")
    database = Database(url)
    with _connect(url) as sql:
        run_state_machine_as_test(lambda: StoreAndModel(database, sql, clock), settings=_settings(SEQUENCES[kind]))
    database.dispose()


def _settings(sequences: int) -> settings:
    """The same sequences each time, and no time spent on a shorter failing one; unless many are requested."""
    requested = int(os.environ.get("DISTILLERY_TEST_LIVES", "0"))
    return settings(
        max_examples=requested or sequences,
        derandomize=not requested,
        phases=[Phase.generate, Phase.shrink] if requested else [Phase.generate],
        stateful_step_count=MOVES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
