"""What the life of a job ought to be, in plain Python: no SQL, no locks, nothing of the store's own code.

Its clock only moves when it is told to. It counts in units so long that what a test really takes is nothing beside one.
"""

from dataclasses import dataclass, field, replace

LEASE, WAIT, DEADLINE, RERING = 1.5, 1.5, 1.5, 1.25
"""In units of time. Time passes by whole ones, so that nothing ever falls due at the very moment it is looked at."""

REFUSED, NOT_LAWFUL, NOT_FOUND, CONFLICT = "LeaseLost", "ActionNotAllowed", "NotFound", "IdempotencyConflict"
ENDED = ("succeeded", "failed", "cancelled")
FAILED = "out_of_memory"


@dataclass
class Life:
    """One job, as its row and all that hangs on it should be."""

    id: str
    key: str | None
    body: str
    priority: int
    max_attempts: int
    deadline: float | None
    sent_at: float
    created_at: float
    """By the database's clock, which alone tells the order of those sent within one unit."""
    deadline_at: float | None
    status: str = "queued"
    requested: str | None = None
    fence: int = 0
    attempts: int = 0
    reached: int | None = None
    claimed_at_step: int | None = None
    lease_until: float | None = None
    not_before: float | None = None
    error: str | None = None
    feed: list[str] = field(default_factory=lambda: ["queued"])
    tried: list[tuple[int, str | None]] = field(default_factory=list)
    """Fence, and how it ended; None: it has not."""
    checkpoints: set[tuple[int, int]] = field(default_factory=set)
    """Step and fence."""
    metrics: dict[int, int] = field(default_factory=dict)
    """By step, the fence that wrote the value."""
    published_by: int | None = None

    @property
    def got_somewhere(self) -> bool:
        return (self.reached or 0) > (self.claimed_at_step or 0)

    @property
    def has_attempts(self) -> bool:
        return self.attempts < self.max_attempts or self.got_somewhere

    def newest(self) -> list[tuple[int, int]]:
        return sorted(self.checkpoints, reverse=True)

    def leave(self, status: str, told: str, how: str | None = None) -> None:
        """Stop running, or stop waiting: nobody owns it any more, and no request is left."""
        self.status, self.requested, self.lease_until = status, None, None
        if how is not None and self.tried and self.tried[-1][1] is None:
            self.tried[-1] = (self.tried[-1][0], how)
        self.feed.append(told)

    def granted(self, otherwise: str) -> str:
        return {"cancel": "cancelled", "pause": "paused", None: otherwise}[self.requested]


class Model:
    """Each move answers what the store should: a value, or the name of its refusal."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lives: dict[str, Life] = {}

    # ── clients ──

    def sent_before(self, key: str | None, body: str) -> tuple[str, bool] | str | None:
        """A submit's answer where the key is known: that job, which is not new, or a refusal."""
        for life in self.lives.values():
            if key is not None and life.key == key:
                return (life.id, False) if life.body == body else CONFLICT
        return None

    def cancel(self, job_id: str) -> str:
        life = self.lives.get(job_id)
        if life is None:
            return NOT_FOUND
        if life.status in ("succeeded", "failed"):
            return NOT_LAWFUL
        if life.status in ("queued", "paused"):
            life.fence += 1
            life.leave("cancelled", "cancelled")
        elif life.status == "running" and life.requested != "cancel":
            life.requested = "cancel"
            life.feed.append("cancel_requested")
        return life.status

    def pause(self, job_id: str) -> str:
        life = self.lives.get(job_id)
        if life is None:
            return NOT_FOUND
        if life.status in ENDED or life.requested == "cancel":
            return NOT_LAWFUL
        if life.status == "queued":
            life.leave("paused", "paused")
        elif life.status == "running" and life.requested is None:
            life.requested = "pause"
            life.feed.append("pause_requested")
        return life.status

    def resume(self, job_id: str) -> str:
        return self._wait_again(job_id, ("paused",), "resumed")

    def retry(self, job_id: str, from_scratch: bool = False) -> str:
        answer = self._wait_again(job_id, ("failed", "cancelled"), "retried")
        if answer == "queued":
            life = self.lives[job_id]
            life.attempts, life.error = 0, None
            life.deadline_at = None if life.deadline is None else self.now + life.deadline
            if from_scratch:
                life.reached = life.claimed_at_step = None
                life.checkpoints, life.metrics = set(), {}
        return answer

    def _wait_again(self, job_id: str, allowed_actions: tuple[str, ...], told: str) -> str:
        life = self.lives.get(job_id)
        if life is None:
            return NOT_FOUND
        if life.status not in allowed_actions:
            return NOT_LAWFUL
        life.not_before = None
        life.leave("queued", told)
        return life.status

    def delete(self, job_id: str) -> str | None:
        life = self.lives.get(job_id)
        if life is None:
            return NOT_FOUND
        if life.status not in ENDED:
            return NOT_LAWFUL
        del self.lives[job_id]
        return None

    def waits_for_a_client(self) -> list[str]:
        return [life.id for life in self.lives.values() if life.status in ("paused", "failed", "cancelled")]

    # ── workers ──

    def next(self, rescue: bool) -> Life | None:
        """Whom a claim should take."""
        waiting = [life for life in self._in_order() if self._claimable(life, rescue)]
        return waiting[0] if waiting else None

    def claim(self, rescue: bool) -> tuple[Life, bool] | None:
        """As it is once claimed, and whether its owner had fallen silent."""
        life = self.next(rescue)
        if life is None:
            return None
        takeover = life.status == "running"
        if takeover:
            life.tried[-1] = (life.fence, "lost")
        life.attempts = 1 if life.got_somewhere else life.attempts + 1
        life.fence += 1
        life.status, life.claimed_at_step, life.not_before = "running", life.reached, None
        life.lease_until, life.error = self.now + LEASE, None
        life.tried.append((life.fence, None))
        life.feed.append("claimed")
        return replace(life), takeover

    def mine(self, job_id: str, fence: int) -> Life | None:
        life = self.lives.get(job_id)
        return life if life and (life.status, life.fence) == ("running", fence) else None

    def stands(self, job_id: str, fence: int, *statuses: str) -> bool:
        life = self.lives.get(job_id)
        return life is not None and life.fence == fence and life.status in statuses

    def beat(self, job_id: str, fence: int) -> str | None:
        life = self.mine(job_id, fence)
        if life is None:
            return REFUSED
        life.lease_until = self.now + LEASE
        return life.requested

    def tell(self, job_id: str, fence: int, told: str | None) -> str | None:
        """Any fenced write; `told` is what it adds to the feed."""
        life = self.mine(job_id, fence)
        if life is None:
            return REFUSED
        if told is not None:
            life.feed.append(told)
        return None

    def checkpoint(self, job_id: str, fence: int, step: int) -> str | None:
        if (answer := self.tell(job_id, fence, "checkpoint")) is None:
            life = self.lives[job_id]
            life.reached = max(life.reached or 0, step)
            life.checkpoints.add((step, fence))
        return answer

    def metric(self, job_id: str, fence: int, step: int) -> str | None:
        if (answer := self.tell(job_id, fence, None)) is None:
            self.lives[job_id].metrics[step] = fence
        return answer

    def hand_back(self, job_id: str, fence: int, to: str, wait: float | None = None) -> bool:
        """Release, or postpone where there is something to wait for."""
        life = self.mine(job_id, fence)
        if life is None:
            return self.stands(job_id, fence, "queued", "paused", "cancelled")
        life.attempts -= 1
        if wait is not None:
            life.error, life.not_before = FAILED, self.now + wait
        status = life.granted(to)
        released = "released" if status == "queued" else status
        life.leave(status, released, released)
        return True

    def succeed(self, job_id: str, fence: int) -> bool:
        life = self.mine(job_id, fence)
        if life is None:
            return self.stands(job_id, fence, "succeeded")
        life.error, life.published_by = None, fence
        life.leave("succeeded", "succeeded", "succeeded")
        return True

    def fail(self, job_id: str, fence: int, wait: float | None) -> bool:
        life = self.mine(job_id, fence)
        if life is None:
            return self.stands(job_id, fence, "failed", *(() if wait is None else ("queued", "paused", "cancelled")))
        life.error = FAILED
        status = "failed"
        if wait is not None and life.has_attempts:
            status, life.not_before = life.granted("queued"), self.now + wait
        life.leave(status, status, "failed")
        return True

    def end_cancelled(self, job_id: str, fence: int) -> bool:
        life = self.mine(job_id, fence)
        if life is None:
            return self.stands(job_id, fence, "cancelled")
        life.leave("cancelled", "cancelled", "cancelled")
        return True

    # ── time, and who tidies up after it ──

    def sweep(self, rescue: bool) -> list[str]:
        """The jobs that have waited in silence."""
        for life in self.lives.values():
            if life.status in ("queued", "paused") and self._overdue(life):
                life.error = "deadline_exceeded"
                life.leave("failed", "failed")
            elif rescue and self._lapsed(life):
                self._end_abandoned(life)
        return [life.id for life in self._in_order() if self._due(life) and self._due_since(life) < self.now - RERING]

    def _end_abandoned(self, life: Life) -> None:
        if life.requested == "cancel" or (life.requested == "pause" and life.has_attempts):
            status = life.granted("")
        elif self._overdue(life) or not life.has_attempts:
            status, life.error = "failed", "deadline_exceeded" if self._overdue(life) else "worker_lost"
        else:
            return
        life.fence += 1
        life.leave(status, status, "lost")

    def _in_order(self) -> list[Life]:
        return sorted(self.lives.values(), key=lambda life: (-life.priority, life.created_at, life.id))

    def _claimable(self, life: Life, rescue: bool) -> bool:
        ripe = self._due(life) or (rescue and self._lapsed(life) and life.requested is None)
        return ripe and life.has_attempts and not self._overdue(life)

    def _due(self, life: Life) -> bool:
        return life.status == "queued" and (life.not_before is None or life.not_before <= self.now)

    def _due_since(self, life: Life) -> float:
        return life.sent_at if life.not_before is None else life.not_before

    def _lapsed(self, life: Life) -> bool:
        return life.lease_until is not None and life.lease_until < self.now

    def _overdue(self, life: Life) -> bool:
        return life.deadline_at is not None and life.deadline_at < self.now
