"""Threads make random moves on the same few jobs; then the events and attempts of each job must be consistent.

The last test removes the fence, and the same checks must fail: a check that cannot fail proves nothing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from sqlalchemy import and_, select

from base.jobs import TERMINAL
from store import attempts, checkpoints, events, jobs, lifecycle
from store.database import Database
from store.errors import ActionNotAllowed, LeaseLost
from store.lifecycle import Claim
from store.tables import jobs as rows
from tests.store.helpers import ERROR, SHA256, expire_lease, read_job, run_concurrently, submitted

WAITING, RUNNING = "queued", "running"
ALIVE = (WAITING, RUNNING, "paused")
MAY_FOLLOW = {
    "queued": (RUNNING,),
    "claimed": (WAITING, RUNNING),
    "checkpoint": (RUNNING,),
    "cancel_requested": (RUNNING,),
    "pause_requested": (RUNNING,),
    "released": (RUNNING,),
    "paused": (WAITING, RUNNING),
    "resumed": ("paused",),
    "retried": ("failed", "cancelled"),
    "cancelled": ALIVE,
    "failed": (RUNNING,),
    "succeeded": (RUNNING,),
}
"""The statuses in which an event may happen."""
LEADS_TO = {"claimed": RUNNING, "released": WAITING, "resumed": WAITING, "retried": WAITING, "queued": WAITING}


@dataclass
class Actor:
    """One thread: a worker that may be frozen for long, and sometimes a client."""

    database: Database
    job_ids: list[str]
    chance: random.Random
    claims: list[Claim] = field(default_factory=list)
    ended: list[tuple[str, int]] = field(default_factory=list)
    """Job and fence of every end that succeeded."""

    def work(self, count: int) -> None:
        moves: list[Callable[[], None]] = [self.claim, self.claim, self.save, self.end, self.end, self.request]
        moves += [self.expire, self.sweep]
        for _ in range(count):
            try:
                self.chance.choice(moves)()
            except (LeaseLost, ActionNotAllowed):
                continue

    def claim(self) -> None:
        with self.database.begin() as connection:
            claim = lifecycle.claim(connection, f"actor {id(self)}", 30, takeover=True)
        if claim is not None:
            self.claims.append(claim)

    def save(self) -> None:
        if self.claims:
            claim = self.chance.choice(self.claims)
            step = self.chance.randrange(100)
            with self.database.begin() as connection:
                checkpoints.record(
                    connection, claim.job.id, claim.fence, step=step, sha256=SHA256, bytes=1, path=f"{step}.pt"
                )

    def end(self) -> None:
        """End the job of any claim, however stale."""
        if not self.claims:
            return
        claim = self.chance.choice(self.claims)
        job_id, fence = claim.job.id, claim.fence
        with self.database.begin() as connection:
            succeeded = self.chance.choice(
                [
                    lambda: lifecycle.finish_succeeded(connection, job_id, fence, {}, []),
                    lambda: lifecycle.finish_failed(connection, job_id, fence, ERROR, None),
                    lambda: lifecycle.finish_failed(connection, job_id, fence, ERROR, 0),
                    lambda: lifecycle.finish_cancelled(connection, job_id, fence),
                    lambda: lifecycle.release(connection, job_id, fence, "drain"),
                ]
            )()
        if succeeded:
            self.ended.append((job_id, fence))

    def request(self) -> None:
        action = self.chance.choice([jobs.cancel, jobs.pause, jobs.resume, jobs.resume, jobs.retry, jobs.retry])
        with self.database.begin() as connection:
            action(connection, self.chance.choice(self.job_ids))

    def expire(self) -> None:
        job_id = self.chance.choice(self.job_ids)
        if read_job(self.database, job_id).status == RUNNING and self.chance.random() < 0.5:
            self.expire_if_running(job_id)

    def expire_if_running(self, job_id: str) -> None:
        with self.database.begin() as connection:
            running = and_(rows.c.id == job_id, rows.c.status == RUNNING)
            connection.execute(rows.update().where(running).values(lease_until=0))

    def sweep(self) -> None:
        with self.database.begin() as connection:
            lifecycle.sweep(connection, takeover=True)


def check_consistency(database: Database, job_ids: list[str], ended: list[tuple[str, int]]) -> None:
    """The events are allowed moves that lead to the row's status, and no stale attempt has ended the job."""
    for job_id in job_ids:
        with database.connect() as connection:
            feed = events.list_events(connection, job_id, 0, 100_000)
            history = attempts.list_attempts(connection, job_id)
            job = jobs.get(connection, job_id)
        assert [event.seq for event in feed] == list(range(1, job.event_seq + 1))
        assert feed[0].type == "queued"
        status = WAITING
        for event in feed[1:]:
            assert status in MAY_FOLLOW[event.type], f"{event.type} happened to a job that was {status}"
            status = LEADS_TO.get(event.type, event.type if event.type in (*TERMINAL, "paused") else status)
        assert status == job.status
        fences = [event.data["attempt"] for event in feed if event.type == "claimed"]
        assert fences == [attempt.fence for attempt in history] == sorted(set(fences))
        assert [attempt.how is None for attempt in history[:-1]] == [False] * len(history[:-1])
        assert (job.status == RUNNING) == (bool(history) and history[-1].how is None)
        lost = {(job_id, attempt.fence) for attempt in history if attempt.how == "lost"}
        assert not lost & set(ended), "a lost attempt ended the job"


@pytest.mark.parametrize("seed", [1, 2])
def test_random_moves_leave_every_job_consistent(database: Database, seed: int):
    job_ids = [submitted(database).id for _ in range(4)]
    actors = [Actor(database, job_ids, random.Random(10 * seed + number)) for number in range(4)]
    assert run_concurrently([lambda actor=actor: actor.work(40) for actor in actors]) == [None] * 4
    check_consistency(database, job_ids, [end for actor in actors for end in actor.ended])
    with database.connect() as connection:
        assert sum(jobs.count_by_status(connection).values()) == 4
        assert connection.scalars(select(rows.c.id).where(rows.c.fence == 0)).all() == []


def test_check_finds_that_the_fence_is_missing(database: Database, monkeypatch: pytest.MonkeyPatch):
    job_id = submitted(database).id
    actor = Actor(database, [job_id], random.Random(0))
    actor.claim()
    expire_lease(database, job_id)
    Actor(database, [job_id], random.Random(0)).claim()
    monkeypatch.setattr(
        lifecycle, "owned_by", lambda job_id, fence: and_(rows.c.id == job_id, rows.c.status == RUNNING)
    )
    while not actor.ended:
        actor.end()
    with pytest.raises(AssertionError, match="a lost attempt ended the job"):
        check_consistency(database, [job_id], actor.ended)
