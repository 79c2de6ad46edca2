"""Any moves in any order, by owners and clients of any age: the store answers as the model, and the rows say the same.

DISTILLERY_TEST_LIVES=5000 pytest tests/store/test_state_machine.py      that many lives, others each time
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
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as live

from store import checkpoints, events, jobs, lifecycle, metrics
from store.artifacts import NewArtifact
from store.database import Database
from store.errors import StoreError
from store.lifecycle import Claim
from tests.store.model import DEADLINE, ENDED, LEASE, RERING, WAIT, Life, Model
from tests.store.scene import ERROR, SHA256, lapse

T = TypeVar("T")

UNIT_S = 10_000
"""One unit of the model's time. What a life really takes must be nothing beside it, on the slowest machine."""
LIVES = {"sqlite": 110, "postgres": 30}
MOVES = 30
AT_ONCE = 3
"""Jobs that have not ended: few, so that moves meet."""

NEVER = {
    "runs without lease or owner, or has one and does not run": """
        SELECT id FROM jobs WHERE (status = 'running') <> (lease_until IS NOT NULL)
                               OR (status = 'running') <> (owner IS NOT NULL)""",
    "has a request, and does not run": "SELECT id FROM jobs WHERE requested IS NOT NULL AND status <> 'running'",
    "has ended without an hour, or lives on after one": """
        SELECT id FROM jobs WHERE (status IN ('succeeded', 'failed', 'cancelled')) <> (finished_at IS NOT NULL)""",
    "has spent more attempts than it has": """
        SELECT id FROM jobs WHERE attempts_without_progress NOT BETWEEN 0 AND max_attempts""",
    "waits for an attempt that it does not have": """
        SELECT id FROM jobs WHERE status IN ('queued', 'paused') AND attempts_without_progress >= max_attempts
                              AND coalesce(checkpoint_step, -1) <= coalesce(claimed_step, -1)""",
    "has an open attempt other than its latest": """
        SELECT id FROM jobs JOIN job_attempts a ON job_id = id
        WHERE ended_at IS NULL AND NOT (status = 'running' AND a.fence = jobs.fence)""",
    "runs in no attempt": """
        SELECT id FROM jobs WHERE status = 'running' AND NOT EXISTS (
            SELECT 1 FROM job_attempts a WHERE job_id = id AND a.fence = jobs.fence AND ended_at IS NULL)""",
    "shows artifacts without success": """
        SELECT id FROM jobs JOIN artifacts ON job_id = id WHERE status <> 'succeeded' OR bytes <> fence""",
    "succeeded with an error": "SELECT id FROM jobs WHERE status = 'succeeded' AND error IS NOT NULL",
    "has a gap in its feed": """
        SELECT id FROM jobs LEFT JOIN job_events ON job_id = id GROUP BY id, event_seq
        HAVING count(seq) <> event_seq OR min(seq) <> 1 OR max(seq) <> event_seq""",
    "has a checkpoint further than it got": """
        SELECT id FROM jobs JOIN checkpoints ON job_id = id WHERE step > coalesce(checkpoint_step, -1)""",
}
"""What no job ever is or does. The bytes of what a test publishes are its author's fence."""
WHO_DOES = " UNION ALL ".join(f"SELECT '{what}', id FROM ({rows}) AS found" for what, rows in NEVER.items())  # noqa: S608

ROWS = """
    SELECT id, status, requested, fence, attempts_without_progress, checkpoint_step, claimed_step, error ->> 'code'
    FROM jobs"""
FEEDS = """
    SELECT job_id, type, CAST(coalesce(
        data ->> 'author', data -> 'error' ->> 'author', data -> 'artifacts' -> 0 ->> 'bytes', data ->> 'attempt',
        CASE WHEN type = 'checkpoint' THEN data ->> 'bytes' END
    ) AS INTEGER) FROM job_events ORDER BY job_id, seq"""
"""Who brought an event about: the fence that a test left in it, if it was an owner."""
REST = {
    "job_attempts": "SELECT job_id, fence, how FROM job_attempts",
    "checkpoints": "SELECT job_id, step, fence FROM checkpoints",
    "metrics": "SELECT job_id, step, value FROM metrics",
    "artifacts": "SELECT job_id, bytes FROM artifacts",
}

STEPS = st.integers(1, 6)
SAID = st.sampled_from(["beat", "phase", "progress", "event", "metric", "checkpoint", "checkpoint", "checkpoint"])
BACK = st.integers(0, 3)
DEADLINES = st.sampled_from([None, DEADLINE])

WRITES: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "beat": (
        lambda c, job, fence, step: lifecycle.heartbeat(c, job, fence, LEASE * UNIT_S),
        lambda model, job, fence, step: model.beat(job, fence),
    ),
    "phase": (
        lambda c, job, fence, step: lifecycle.phase(c, job, fence, "training"),
        lambda model, job, fence, step: model.tell(job, fence, "phase"),
    ),
    "progress": (
        lambda c, job, fence, step: lifecycle.progress(c, job, fence, {"step": step}),
        lambda model, job, fence, step: model.tell(job, fence, None),
    ),
    "event": (
        lambda c, job, fence, step: events.append(c, job, fence, "warning", {"author": fence}),
        lambda model, job, fence, step: model.tell(job, fence, "warning"),
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
"""What an owner may say while it trains: to the store, and to the model. It leaves its fence in what it writes."""

ENDS: dict[str, tuple[Callable[..., bool], Callable[..., bool]]] = {
    "succeed": (
        lambda c, job, fence: lifecycle.finish_succeeded(c, job, fence, {}, [_student(fence)]),
        lambda model, job, fence: model.succeed(job, fence),
    ),
    "fail": (
        lambda c, job, fence: lifecycle.finish_failed(c, job, fence, _error(fence), None),
        lambda model, job, fence: model.fail(job, fence, None),
    ),
    "fail, again at once": (
        lambda c, job, fence: lifecycle.finish_failed(c, job, fence, _error(fence), 0),
        lambda model, job, fence: model.fail(job, fence, 0),
    ),
    "fail, again later": (
        lambda c, job, fence: lifecycle.finish_failed(c, job, fence, _error(fence), WAIT * UNIT_S),
        lambda model, job, fence: model.fail(job, fence, WAIT),
    ),
    "cancel": (lifecycle.finish_cancelled, lambda model, job, fence: model.end_cancelled(job, fence)),
    "drain": (
        lambda c, job, fence: lifecycle.release(c, job, fence, "drain"),
        lambda model, job, fence: model.hand_back(job, fence, "queued"),
    ),
    "pause": (
        lambda c, job, fence: lifecycle.release(c, job, fence, "pause", "paused"),
        lambda model, job, fence: model.hand_back(job, fence, "paused"),
    ),
    "postpone": (
        lambda c, job, fence: lifecycle.postpone(c, job, fence, _error(fence), WAIT * UNIT_S),
        lambda model, job, fence: model.hand_back(job, fence, "queued", WAIT),
    ),
}


class Lives(RuleBasedStateMachine):
    """Jobs and claims are chosen by how new they are. An owner that lost its job goes on trying for ever."""

    def __init__(self, database: Database, eyes: Any) -> None:
        super().__init__()
        self.database, self.eyes, self.model = database, eyes, Model()
        self.sent: list[str] = []
        self.claims: list[Claim] = []
        self.fences: dict[str, int] = {}
        self.eyes.execute("DELETE FROM jobs")

    def ask(self, move: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """The store's answer, or the name of its refusal; of a job, how it stands."""
        try:
            with self.database.begin() as connection:
                answer = move(connection, *args, **named)
        except StoreError as refused:
            return type(refused).__name__
        return answer.status if isinstance(answer, jobs.Job) else answer

    # ── clients ──

    @initialize(max_attempts=st.integers(1, 3), deadline=DEADLINES)
    def two_are_sent_and_one_is_claimed(self, max_attempts: int, deadline: float | None) -> None:
        self.submit("a key", "5", 0, max_attempts, deadline)
        self.submit(None, "6", 1, max_attempts, None)
        self.claim(rescue=False)

    @precondition(lambda self: sum(life.status not in ENDED for life in self.model.lives.values()) < AT_ONCE)
    @rule(
        key=st.sampled_from([None, "a key", "another"]),
        body=st.sampled_from(["5", "6"]),
        priority=st.integers(0, 1),
        max_attempts=st.integers(1, 3),
        deadline=DEADLINES,
    )
    def submit(self, key: str | None, body: str, priority: int, max_attempts: int, deadline: float | None) -> None:
        answer = self.ask(jobs.submit, **_asked(key, body, priority, max_attempts, deadline))
        expected = self.model.sent_before(key, body)
        if expected is not None:
            assert (answer if isinstance(answer, str) else (answer[0].id, answer[1])) == expected
            return
        job, is_new = answer
        assert is_new
        now = self.model.now
        self.sent.append(job.id)
        self.model.lives[job.id] = Life(
            id=job.id,
            key=key,
            body=body,
            priority=priority,
            max_attempts=max_attempts,
            deadline=deadline,
            sent_at=now,
            created_at=job.created_at + now * UNIT_S,
            deadline_at=None if deadline is None else now + deadline,
        )

    @rule(back=BACK, verb=st.sampled_from(["cancel", "pause", "resume", "retry", "delete"]))
    def steer(self, back: int, verb: str) -> None:
        job_id = _newest(self.sent, back)
        assert self.ask(getattr(jobs, verb), job_id) == getattr(self.model, verb)(job_id)

    @precondition(lambda self: self.model.waits_for_a_client())
    @rule(from_scratch=st.booleans())
    def go_on(self, from_scratch: bool) -> None:
        """Let the first that no worker can help be claimed again."""
        job_id = self.model.waits_for_a_client()[0]
        if self.model.lives[job_id].status == "paused":
            assert self.ask(jobs.resume, job_id) == self.model.resume(job_id)
        else:
            assert self.ask(jobs.retry, job_id, from_scratch=from_scratch) == self.model.retry(job_id, from_scratch)

    # ── workers ──

    @precondition(lambda self: self.model.next(rescue=True) is not None)
    @rule(rescue=st.booleans())
    def claim(self, rescue: bool) -> None:
        claim = self.ask(lifecycle.claim, "worker", LEASE * UNIT_S, rescue=rescue)
        expected = self.model.claim(rescue)
        if expected is None:
            assert claim is None
            return
        life, takeover = expected
        assert (claim.job.id, claim.fence, claim.attempts_without_progress) == (life.id, life.fence, life.attempts)
        assert claim.takeover == takeover
        assert [(one.step, one.fence) for one in claim.checkpoints] == life.newest()
        self.claims.append(claim)

    @rule(back=BACK, write=SAID, step=STEPS)
    def write(self, back: int, write: str, step: int) -> None:
        claim, (store, model) = _newest(self.claims, back), WRITES[write]
        answer = self.ask(store, claim.job.id, claim.fence, step)
        assert (answer if isinstance(answer, str) else None) == model(self.model, claim.job.id, claim.fence, step)

    @rule(back=BACK, end=st.sampled_from(list(ENDS)))
    def end(self, back: int, end: str) -> None:
        claim, (store, model) = _newest(self.claims, back), ENDS[end]
        assert self.ask(store, claim.job.id, claim.fence) == model(self.model, claim.job.id, claim.fence)

    @precondition(lambda self: self.model.next(rescue=True) is not None)
    @rule(rescue=st.booleans(), write=SAID, step=STEPS, end=st.sampled_from(list(ENDS)))
    def try_once(self, rescue: bool, write: str, step: int, end: str) -> None:
        """A whole attempt at whatever comes next; or once more by whoever was the last, where nothing does."""
        self.claim(rescue)
        self.write(0, write, step)
        self.end(0, end)

    # ── time, and who tidies up after it ──

    @rule(units=st.integers(1, 2))
    def time_passes(self, units: int) -> None:
        """All that was written down moves back, which is the same."""
        columns = ("created_at", "lease_until", "not_before", "deadline_at")
        back = ", ".join(f"{column} = {column} - {units * UNIT_S}" for column in columns)
        self.eyes.execute(f"UPDATE jobs SET {back}")  # noqa: S608
        self.model.now += units

    @precondition(lambda self: any(life.status == "running" for life in self.model.lives.values()))
    @rule(back=BACK, taken_over=st.booleans())
    def an_owner_falls_silent(self, back: int, taken_over: bool) -> None:
        life = _newest([life for life in self.model.lives.values() if life.status == "running"], back)
        life.lease_until = self.model.now - 0.5
        lapse(self.database, life.id)
        if taken_over:
            self.claim(rescue=True)

    @rule(rescue=st.booleans())
    def sweep(self, rescue: bool) -> None:
        answer = self.ask(lifecycle.sweep, rescue=rescue, rering_s=RERING * UNIT_S)
        assert answer == self.model.sweep(rescue)
        assert self.ask(lifecycle.peek, rescue) == (self.model.next(rescue) is not None)

    # ── what always holds ──

    @invariant()
    def nobody_does_what_must_never_be(self) -> None:
        assert self.rows(WHO_DOES) == []

    @invariant()
    def every_feed_tells_a_lawful_life(self) -> None:
        feeds: dict[str, list[tuple[str, int | None]]] = defaultdict(list)
        for job_id, type, author in self.eyes.execute(FEEDS):
            feeds[job_id].append((type, author))
        for feed in feeds.values():
            _must_be_lawful(feed)
        told = {job_id: [type for type, _ in feed] for job_id, feed in feeds.items()}
        assert told == {life.id: life.feed for life in self.model.lives.values()}

    @invariant()
    def the_rows_say_what_the_model_says(self) -> None:
        found = self.rows(ROWS)
        assert found == sorted(_row(life) for life in self.model.lives.values())
        for table, hangs_on in _rest(self.model).items():
            assert self.rows(REST[table]) == sorted(hangs_on)
        with self.database.connect() as connection:
            assert jobs.by_status(connection) == Counter(status for _, status, *_ in found)

    @invariant()
    def no_fence_ever_goes_back(self) -> None:
        fences = dict(self.rows("SELECT id, fence FROM jobs"))
        assert all(fences.get(job_id, fence) >= fence for job_id, fence in self.fences.items())
        self.fences = fences

    def rows(self, question: str) -> list[tuple[Any, ...]]:
        return sorted(self.eyes.execute(question))


def _row(life: Life) -> tuple[Any, ...]:
    row = (life.id, life.status, life.requested, life.fence, life.attempts, life.reached, life.claimed_at_step)
    return (*row, life.error)


def _rest(model: Model) -> dict[str, list[tuple[Any, ...]]]:
    lives = model.lives.values()
    return {
        "job_attempts": [(life.id, *attempt) for life in lives for attempt in life.tried],
        "checkpoints": [(life.id, *checkpoint) for life in lives for checkpoint in life.checkpoints],
        "metrics": [(life.id, *point) for life in lives for point in life.metrics.items()],
        "artifacts": [(life.id, life.published_by) for life in lives if life.published_by is not None],
    }


def _must_be_lawful(feed: list[tuple[str, int | None]]) -> None:
    """One end to each life, a claim's fence above all before it, and nothing by anybody but the last to claim."""
    fence, ended = 0, False
    for type, author in feed:
        assert ended == (type == "retried"), f"{type} came {'after' if ended else 'before'} the end"
        ended = type in ENDED
        if type == "claimed":
            assert author is not None and author > fence
            fence = author
        assert author in (None, fence), f"{type} came from an owner that had lost the job"


def _newest(some: list[T], back: int) -> T:
    """The newest but `back`."""
    return some[-1 - back % len(some)]


def _asked(key: str | None, body: str, priority: int, max_attempts: int, deadline: float | None) -> dict[str, Any]:
    return {
        "project": "ours",
        "spec": {},
        "resolved": {},
        "name": None,
        "method": "kd",
        "spec_sha256": body * 64,
        "max_attempts": max_attempts,
        "idempotency_key": key,
        "priority": priority,
        "deadline_s": None if deadline is None else deadline * UNIT_S,
    }


def _student(fence: int) -> NewArtifact:
    return NewArtifact("student.safetensors", SHA256, fence, "application/octet-stream")


def _error(fence: int) -> dict[str, Any]:
    return {**ERROR, "author": fence}


@contextmanager
def _eyes(url: str) -> Iterator[Any]:
    """A connection that owes nothing to the store."""
    if url.startswith("sqlite:///"):
        eyes: Any = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        eyes.execute("PRAGMA foreign_keys = ON")
    else:
        eyes = psycopg.connect(url, autocommit=True)
    with closing(eyes):
        yield eyes


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", LIVES)
def test_the_store_does_what_the_model_does(kind: str, request: pytest.FixtureRequest):
    url = request.getfixturevalue(f"{kind}_database_url")
    database = Database(url)
    with _eyes(url) as eyes:
        live(lambda: Lives(database, eyes), settings=_settings(LIVES[kind]))
    database.dispose()


def _settings(lives: int) -> settings:
    """The same lives each time, and no time spent on a shorter one that fails, unless somebody asks for many."""
    asked = int(os.environ.get("DISTILLERY_TEST_LIVES", "0"))
    return settings(
        max_examples=asked or lives,
        derandomize=not asked,
        phases=[Phase.generate, Phase.shrink] if asked else [Phase.generate],
        stateful_step_count=MOVES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
