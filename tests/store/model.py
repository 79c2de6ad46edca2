"""A model of the store: what the transitions of a job should do, in plain Python without SQL or locks.

Its clock moves only in whole units, which are so long that the real duration of a test does not matter.
"""

from dataclasses import dataclass, field, replace

LEASE, WAIT, DEADLINE, RERING = 1.5, 1.5, 1.5, 1.25
"""In units of time. None is a whole number, so that nothing is due exactly at the moment of a check."""

LEASE_LOST, NOT_ALLOWED, NOT_FOUND, CONFLICT = "LeaseLost", "ActionNotAllowed", "NotFound", "IdempotencyConflict"
UNAVAILABLE = "TeacherUnavailable"
ENDED = ("succeeded", "failed", "cancelled")
FAILED = "out_of_memory"


@dataclass
class ModelJob:
    """One job: what its row, and the rows that belong to it, should hold."""

    id: str
    key: str | None
    body: str
    priority: int
    max_attempts: int
    deadline: float | None
    submitted_at: float
    created_at: float
    """By the database's clock, which orders the jobs that were submitted within one unit."""
    deadline_at: float | None
    status: str = "queued"
    requested: str | None = None
    fence: int = 0
    attempts_without_progress: int = 0
    checkpoint_step: int | None = None
    claimed_step: int | None = None
    lease_until: float | None = None
    not_before: float | None = None
    error: str | None = None
    teacher: str | None = None
    """The job whose student it waits for."""
    events: list[str] = field(default_factory=lambda: ["queued"])
    attempts: list[tuple[int, str | None]] = field(default_factory=list)
    """Fence, and how it ended; None while it is open."""
    checkpoints: set[tuple[int, int]] = field(default_factory=set)
    """Step and fence."""
    metrics: dict[int, int] = field(default_factory=dict)
    """By step, the fence that wrote the value."""
    published_by: int | None = None

    @property
    def made_progress(self) -> bool:
        return (self.checkpoint_step or 0) > (self.claimed_step or 0)

    @property
    def has_attempts(self) -> bool:
        return self.attempts_without_progress < self.max_attempts or self.made_progress

    def newest_checkpoints(self) -> list[tuple[int, int]]:
        return sorted(self.checkpoints, reverse=True)

    def move(self, status: str, event: str, how: str | None = None) -> None:
        """Take a status without an owner and without a request, and close the open attempt if `how` is given."""
        self.status, self.requested, self.lease_until = status, None, None
        if how is not None and self.attempts and self.attempts[-1][1] is None:
            self.attempts[-1] = (self.attempts[-1][0], how)
        self.events.append(event)

    def requested_or(self, status: str) -> str:
        return {"cancel": "cancelled", "pause": "paused", None: status}[self.requested]


class Model:
    """Each method returns what the store's function should: a value, or the name of its error."""

    def __init__(self) -> None:
        self.now = 0.0
        self.jobs: dict[str, ModelJob] = {}

    # ── clients ──

    def find_by_key(self, key: str | None, body: str) -> tuple[str, bool] | str | None:
        """Return the result of `submit` if the key is known: that job and False, or the name of the error."""
        for job in self.jobs.values():
            if key is not None and job.key == key:
                return (job.id, False) if job.body == body else CONFLICT
        return None

    def add(self, job: ModelJob, teacher: str | None) -> None:
        """Submit a job; its teacher is one that `teaches` now."""
        self.jobs[job.id] = job
        job.teacher = teacher
        self._tell_of_ends()

    def teaches(self, teacher: str | None) -> bool:
        """Return whether this job may be named as a teacher: it exists, and its student is there or can still come."""
        job = self.jobs.get(teacher or "")
        return teacher is None or (job is not None and job.status not in ("failed", "cancelled"))

    def _move(self, job: ModelJob, status: str, event: str, how: str | None = None) -> None:
        job.move(status, event, how)
        self._tell_of_ends()

    def _tell_of_ends(self) -> None:
        """Give jobs the students that they wait for, and fail those whose teacher has ended without one."""
        for job in sorted(self.jobs.values(), key=lambda job: job.id):
            teacher = self.jobs.get(job.teacher or "")
            if teacher is None or teacher.status not in ENDED or job.status not in ("queued", "paused"):
                continue
            if teacher.status == "succeeded":
                job.teacher = None
                job.events.append("teacher_ready")
            else:
                job.error = "teacher_unavailable"
                self._move(job, "failed", "failed")

    def cancel(self, job_id: str) -> str:
        job = self.jobs.get(job_id)
        if job is None:
            return NOT_FOUND
        if job.status in ("succeeded", "failed"):
            return NOT_ALLOWED
        if job.status in ("queued", "paused"):
            job.fence += 1
            self._move(job, "cancelled", "cancelled")
        elif job.status == "running" and job.requested != "cancel":
            job.requested = "cancel"
            job.events.append("cancel_requested")
        return job.status

    def pause(self, job_id: str) -> str:
        job = self.jobs.get(job_id)
        if job is None:
            return NOT_FOUND
        if job.status in ENDED or job.requested == "cancel":
            return NOT_ALLOWED
        if job.status == "queued":
            self._move(job, "paused", "paused")
        elif job.status == "running" and job.requested is None:
            job.requested = "pause"
            job.events.append("pause_requested")
        return job.status

    def resume(self, job_id: str) -> str:
        return self._queue_again(job_id, ("paused",), "resumed")

    def retry(self, job_id: str, from_scratch: bool = False) -> str:
        failed = self.jobs.get(job_id)
        if failed is not None and failed.status in ("failed", "cancelled") and not self.teaches(failed.teacher):
            return UNAVAILABLE
        result = self._queue_again(job_id, ("failed", "cancelled"), "retried")
        if result == "queued":
            job = self.jobs[job_id]
            job.attempts_without_progress, job.error = 0, None
            job.deadline_at = None if job.deadline is None else self.now + job.deadline
            if from_scratch:
                job.checkpoint_step = job.claimed_step = None
                job.checkpoints, job.metrics = set(), {}
        return result

    def _queue_again(self, job_id: str, allowed: tuple[str, ...], event: str) -> str:
        job = self.jobs.get(job_id)
        if job is None:
            return NOT_FOUND
        if job.status not in allowed:
            return NOT_ALLOWED
        job.not_before = None
        self._move(job, "queued", event)
        return job.status

    def delete(self, job_id: str) -> str | list[str]:
        job = self.jobs.get(job_id)
        if job is None:
            return NOT_FOUND
        if job.status not in ENDED:
            return NOT_ALLOWED
        del self.jobs[job_id]
        return [job_id]

    def resumable(self) -> list[str]:
        """Return the jobs that only a client can continue."""
        return [job.id for job in self.jobs.values() if job.status in ("paused", "failed", "cancelled")]

    # ── workers ──

    def first_claimable(self, takeover: bool) -> ModelJob | None:
        claimable = [job for job in self._in_order() if self._is_claimable(job, takeover)]
        return claimable[0] if claimable else None

    def claim(self, takeover: bool) -> tuple[ModelJob, bool] | None:
        """Return the claimed job, and whether it was taken over."""
        job = self.first_claimable(takeover)
        if job is None:
            return None
        was_running = job.status == "running"
        if was_running:
            job.attempts[-1] = (job.fence, "lost")
        job.attempts_without_progress = 1 if job.made_progress else job.attempts_without_progress + 1
        job.fence += 1
        job.status, job.claimed_step, job.not_before = "running", job.checkpoint_step, None
        job.lease_until, job.error = self.now + LEASE, None
        job.attempts.append((job.fence, None))
        job.events.append("claimed")
        return replace(job), was_running

    def owned(self, job_id: str, fence: int) -> ModelJob | None:
        job = self.jobs.get(job_id)
        return job if job and (job.status, job.fence) == ("running", fence) else None

    def is_done(self, job_id: str, fence: int, *statuses: str) -> bool:
        job = self.jobs.get(job_id)
        return job is not None and job.fence == fence and job.status in statuses

    def heartbeat(self, job_id: str, fence: int) -> str | None:
        job = self.owned(job_id, fence)
        if job is None:
            return LEASE_LOST
        job.lease_until = self.now + LEASE
        return job.requested

    def write(self, job_id: str, fence: int, event: str | None) -> str | None:
        """Any write of an attempt; with the event that it appends, if any."""
        job = self.owned(job_id, fence)
        if job is None:
            return LEASE_LOST
        if event is not None:
            job.events.append(event)
        return None

    def checkpoint(self, job_id: str, fence: int, step: int) -> str | None:
        if (error := self.write(job_id, fence, "checkpoint")) is None:
            job = self.jobs[job_id]
            job.checkpoint_step = max(job.checkpoint_step or 0, step)
            job.checkpoints.add((step, fence))
        return error

    def metric(self, job_id: str, fence: int, step: int) -> str | None:
        if (error := self.write(job_id, fence, None)) is None:
            self.jobs[job_id].metrics[step] = fence
        return error

    def release(self, job_id: str, fence: int, to: str, wait: float | None = None) -> bool:
        """`release`, or `postpone` if there is a time to wait."""
        job = self.owned(job_id, fence)
        if job is None:
            return self.is_done(job_id, fence, "queued", "paused", "cancelled")
        job.attempts_without_progress -= 1
        if wait is not None:
            job.error, job.not_before = FAILED, self.now + wait
        status = job.requested_or(to)
        released = "released" if status == "queued" else status
        self._move(job, status, released, released)
        return True

    def succeed(self, job_id: str, fence: int) -> bool:
        job = self.owned(job_id, fence)
        if job is None:
            return self.is_done(job_id, fence, "succeeded")
        job.error, job.published_by = None, fence
        self._move(job, "succeeded", "succeeded", "succeeded")
        return True

    def fail(self, job_id: str, fence: int, wait: float | None) -> bool:
        job = self.owned(job_id, fence)
        if job is None:
            after_retry = () if wait is None else ("queued", "paused", "cancelled")
            return self.is_done(job_id, fence, "failed", *after_retry)
        job.error = FAILED
        status = "failed"
        if wait is not None and job.has_attempts:
            status, job.not_before = job.requested_or("queued"), self.now + wait
        self._move(job, status, status, "failed")
        return True

    def finish_cancelled(self, job_id: str, fence: int) -> bool:
        job = self.owned(job_id, fence)
        if job is None:
            return self.is_done(job_id, fence, "cancelled")
        self._move(job, "cancelled", "cancelled", "cancelled")
        return True

    # ── time and sweep ──

    def sweep(self, takeover: bool) -> list[str]:
        """Return the jobs whose wake-up was lost."""
        for job in sorted(self.jobs.values(), key=lambda job: job.id):
            if job.status in ("queued", "paused") and self._is_past_deadline(job):
                job.error = "deadline_exceeded"
                self._move(job, "failed", "failed")
            elif takeover and self._lease_expired(job):
                self._end_abandoned(job)
        return [job.id for job in self._in_order() if self._is_due(job) and self._due_since(job) < self.now - RERING]

    def _end_abandoned(self, job: ModelJob) -> None:
        if job.requested == "cancel" or (job.requested == "pause" and job.has_attempts):
            status = job.requested_or("")
        elif self._is_past_deadline(job) or not job.has_attempts:
            status, job.error = "failed", "deadline_exceeded" if self._is_past_deadline(job) else "worker_lost"
        else:
            return
        job.fence += 1
        self._move(job, status, status, "lost")

    def _in_order(self) -> list[ModelJob]:
        return sorted(self.jobs.values(), key=lambda job: (-job.priority, job.created_at, job.id))

    def _is_claimable(self, job: ModelJob, takeover: bool) -> bool:
        can_take_over = takeover and self._lease_expired(job) and job.requested is None
        return (self._is_due(job) or can_take_over) and job.has_attempts and not self._is_past_deadline(job)

    def _is_due(self, job: ModelJob) -> bool:
        return job.status == "queued" and job.teacher is None and (job.not_before is None or job.not_before <= self.now)

    def _due_since(self, job: ModelJob) -> float:
        return job.submitted_at if job.not_before is None else job.not_before

    def _lease_expired(self, job: ModelJob) -> bool:
        return job.lease_until is not None and job.lease_until < self.now

    def _is_past_deadline(self, job: ModelJob) -> bool:
        return job.deadline_at is not None and job.deadline_at < self.now
