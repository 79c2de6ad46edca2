"""Many hands at random on the same few jobs; then the feeds and attempts are read from outside, and must make sense.

The last test takes the fence away, and the same checks must find it out: a check that cannot fail proves nothing.
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
from tests.store.scene import ERROR, SHA256, at_once, lapse, now, submitted

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
"""Statuses that an event may come upon."""
LEADS_TO = {"claimed": RUNNING, "released": WAITING, "resumed": WAITING, "retried": WAITING, "queued": WAITING}


@dataclass
class Hand:
    """One thread: a worker that may be frozen for long, and now and then a client."""

    database: Database
    job_ids: list[str]
    chance: random.Random
    claims: list[Claim] = field(default_factory=list)
    ended: list[tuple[str, int]] = field(default_factory=list)
    """Job and fence of every end that was granted to us."""

    def work(self, moves: int) -> None:
        doings: list[Callable[[], None]] = [self.claim, self.claim, self.save, self.end, self.end, self.steer]
        doings += [self.fall_silent, self.sweep]
        for _ in range(moves):
            try:
                self.chance.choice(doings)()
            except (LeaseLost, ActionNotAllowed):
                continue

    def claim(self) -> None:
        with self.database.begin() as connection:
            claim = lifecycle.claim(connection, f"hand {id(self)}", 30, rescue=True)
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
        """Of any claim ever made, however stale."""
        if not self.claims:
            return
        claim = self.chance.choice(self.claims)
        job_id, fence = claim.job.id, claim.fence
        with self.database.begin() as connection:
            granted = self.chance.choice(
                [
                    lambda: lifecycle.finish_succeeded(connection, job_id, fence, {}, []),
                    lambda: lifecycle.finish_failed(connection, job_id, fence, ERROR, None),
                    lambda: lifecycle.finish_failed(connection, job_id, fence, ERROR, 0),
                    lambda: lifecycle.finish_cancelled(connection, job_id, fence),
                    lambda: lifecycle.release(connection, job_id, fence, "drain"),
                ]
            )()
        if granted:
            self.ended.append((job_id, fence))

    def steer(self) -> None:
        ask = self.chance.choice([jobs.cancel, jobs.pause, jobs.resume, jobs.resume, jobs.retry, jobs.retry])
        with self.database.begin() as connection:
            ask(connection, self.chance.choice(self.job_ids))

    def fall_silent(self) -> None:
        job_id = self.chance.choice(self.job_ids)
        if now(self.database, job_id).status == RUNNING and self.chance.random() < 0.5:
            self.lapse_if_running(job_id)

    def lapse_if_running(self, job_id: str) -> None:
        with self.database.begin() as connection:
            running = and_(rows.c.id == job_id, rows.c.status == RUNNING)
            connection.execute(rows.update().where(running).values(lease_until=0))

    def sweep(self) -> None:
        with self.database.begin() as connection:
            lifecycle.sweep(connection, rescue=True)


def make_sense(database: Database, job_ids: list[str], ended: list[tuple[str, int]]) -> None:
    """The feed holds allowed moves only, ends in the row's status, and no stale attempt ended the job."""
    for job_id in job_ids:
        with database.connect() as connection:
            told = events.after(connection, job_id, 0, 100_000)
            history = attempts.list(connection, job_id)
            job = jobs.get(connection, job_id)
        assert [event.seq for event in told] == list(range(1, job.event_seq + 1))
        assert told[0].type == "queued"
        status = WAITING
        for event in told[1:]:
            assert status in MAY_FOLLOW[event.type], f"{event.type} came upon a job that was {status}"
            status = LEADS_TO.get(event.type, event.type if event.type in (*TERMINAL, "paused") else status)
        assert status == job.status
        fences = [event.data["attempt"] for event in told if event.type == "claimed"]
        assert fences == [attempt.fence for attempt in history] == sorted(set(fences))
        assert [attempt.how is None for attempt in history[:-1]] == [False] * len(history[:-1])
        assert (job.status == RUNNING) == (bool(history) and history[-1].how is None)
        lost = {(job_id, attempt.fence) for attempt in history if attempt.how == "lost"}
        assert not lost & set(ended), "an attempt that was given up ended the job"


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_happens_every_job_has_a_lawful_life(database: Database, seed: int):
    job_ids = [submitted(database).id for _ in range(4)]
    hands = [Hand(database, job_ids, random.Random(10 * seed + number)) for number in range(4)]
    assert at_once([lambda hand=hand: hand.work(40) for hand in hands]) == [None] * 4
    make_sense(database, job_ids, [end for hand in hands for end in hand.ended])
    with database.connect() as connection:
        assert sum(jobs.by_status(connection).values()) == 4
        assert connection.scalars(select(rows.c.id).where(rows.c.fence == 0)).all() == []


def test_without_the_fence_the_same_checks_find_it_out(database: Database, monkeypatch: pytest.MonkeyPatch):
    job_id = submitted(database).id
    hand = Hand(database, [job_id], random.Random(0))
    hand.claim()
    lapse(database, job_id)
    Hand(database, [job_id], random.Random(0)).claim()
    monkeypatch.setattr(lifecycle, "mine", lambda job_id, fence: and_(rows.c.id == job_id, rows.c.status == RUNNING))
    while not hand.ended:
        hand.end()
    with pytest.raises(AssertionError, match="an attempt that was given up ended the job"):
        make_sense(database, [job_id], hand.ended)
