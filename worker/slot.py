"""One device slot: poll the database, claim a job, run it, poll again. A wake-up message makes it poll at once."""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

from base.clock import boottime, jittered
from base.failpoints import failpoint
from base.processes import free_descriptors
from store import lifecycle
from store.lifecycle import Claim
from worker.attempt import Outcome, run_job
from worker.context import UNAVAILABLE, WorkerContext
from worker.devices import Device
from worker.engine import EnginePool

log = logging.getLogger("distillery.slot")

DESCRIPTORS = 32
"""The files that this process must be able to open before it claims a job: pipes, logs, inputs and databases."""
LONGEST_PAUSE_S = 600.0
JOBS_IN_A_ROW = 2


class Slot:
    """`on_end` is called with the id of each job after an attempt at it; it returns at once and never raises."""

    def __init__(self, context: WorkerContext, device: Device, on_end: Callable[[str], None] | None = None) -> None:
        self._on_end = on_end
        self._context, self.device = context, device
        self.engines = EnginePool(context, device)
        self._wake_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"slot-{device.name}", daemon=True)
        self._short_of_disk_space = False
        self._short_of_descriptors = False
        self._proven_at = boottime()
        self._back_off = BackOff(device.name, context.settings.look_s)
        self._pausing = False
        self.job: str | None = None
        self.has_polled = False

    def start(self) -> None:
        self._thread.start()

    def wake_up(self) -> None:
        """Poll now, or after the current job."""
        self._wake_up.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of a drained slot. Returns False if it has not ended in time."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_free(self) -> bool:
        """True if a wake-up message would make the slot claim a job at once."""
        return self.job is None and not self._pausing

    def describe(self) -> dict[str, Any]:
        """The slot's row: fields of `store.workers.Device`.

        A poll proves that the slot consumes jobs, and so does a heartbeat of its job. Without any proof for a lease it
        is `stuck`. It is also `stuck` while it pauses because jobs fail here before they make progress, and while this
        process can hardly open files.
        """
        job, seen_s = self.job, boottime() - self._proven_at
        if seen_s > self._context.settings.lease_s:
            state = "stuck"
        elif job is not None:
            state = "busy"
        elif self._pausing or self._short_of_descriptors:
            state = "stuck"
        else:
            state = "out_of_disk_space" if self._short_of_disk_space else "idle"
        device = {"name": self.device.name, "memory_bytes": self.device.memory_bytes}
        return {**device, "job": job, "state": state, "seen_s": round(seen_s, 3)}

    def _prove(self) -> None:
        self._proven_at = boottime()

    def _run(self) -> None:
        while not self._context.drain.requested:
            # Before the poll: a wake-up during the poll may be for a job that the poll does not return.
            self._wake_up.clear()
            worked = self._try_to_work()
            self.has_polled = True
            if worked:
                self._pause(self._back_off.pause_s)
            else:
                self._wake_up.wait(jittered(self._context.settings.look_s))
        self.engines.close()

    def _try_to_work(self) -> bool:
        try:
            self.engines.refill()
            return self._work()
        except Exception:
            # A lack of threads, descriptors or engines may be temporary, so it must not end the slot.
            log.exception("%s: no job can be run", self.device.name)
            return False

    def _pause(self, pause_s: float) -> None:
        """Let other slots claim first. A wake-up does not end the pause."""
        if pause_s:
            self.engines.close()
            self._pausing = True
            self._context.drain.wait(pause_s)
            self._pausing = False

    def _work(self) -> bool:
        """Claim and run one job. Returns False if there is none."""
        claimed = self._poll()
        if claimed is None:
            return False
        claim, claimed_at = claimed
        self.job = claim.job.id
        try:
            outcome = run_job(claim, self._context, self.engines, claimed_at, self._prove)
            self._back_off.record(claim.job.id, outcome)
        finally:
            self.job = None
        if self._on_end is not None:
            self._on_end(claim.job.id)
        return True

    def _poll(self) -> tuple[Claim, float] | None:
        """Claim the first waiting job if there is room for it. Returns it, and the time before the claim."""
        if not self._has_disk_space() or not self._has_descriptors():
            self._prove()
            return None
        context = self._context
        try:
            # The query takes no lock, so that idle workers do not wait for each other.
            with context.database.connect() as connection:
                has_work = lifecycle.has_claimable(
                    connection, context.may_take_over(), context.settings.limit_jobs_running
                )
            context.contact.made()
            self._prove()
            if not has_work:
                return None
            with context.begin() as (connection, takeover):
                failpoint("claim.begun")
                claimed_at = boottime()
                claim = lifecycle.claim(
                    connection,
                    context.owner,
                    context.settings.lease_s,
                    takeover=takeover,
                    device=self.device.name,
                    max_running=context.settings.limit_jobs_running,
                )
                failpoint("claim.before_commit")
            failpoint("claim.committed")
            return (claim, claimed_at) if claim else None
        except UNAVAILABLE as error:
            context.contact.lost()
            log.warning("the database cannot be reached, trying again in %g s: %s", context.settings.look_s, error)
        except Exception:
            # Any exception: a driver's error must not end the slot, since no other thread serves this device.
            log.exception("the database could not be polled")
        return None

    def _has_disk_space(self) -> bool:
        """Return False below the limit. A job would fail then, and use the disk space that the database needs."""
        fault = self._disk_fault()
        if fault is not None and not self._short_of_disk_space:
            log.error("%s: no job is started: %s", self.device.name, fault)
        elif fault is None and self._short_of_disk_space:
            log.warning("%s: there is enough disk space again", self.device.name)
        self._short_of_disk_space = fault is not None
        return fault is None

    def _has_descriptors(self) -> bool:
        """Return False if this process can hardly open files. Its connections may have taken them."""
        free = free_descriptors()
        short = free is not None and free < DESCRIPTORS
        if short and not self._short_of_descriptors:
            log.error("%s: no job is started: %s more files can be opened (ulimit -n)", self.device.name, free)
        self._short_of_descriptors = short
        return not short

    def _disk_fault(self) -> str | None:
        """Return the reason why no job can write here, for the operator, or None."""
        context, needed = self._context, self._context.settings.min_free_bytes
        try:
            context.scratch.mkdir(parents=True, exist_ok=True)
            # The two may be on different disks: one for the files, one for scratch folders and SQLite.
            free = {
                context.files.folder: context.files.free_bytes(),
                context.scratch: shutil.disk_usage(context.scratch).free,
            }
        except OSError as error:
            return f"{error.filename} cannot be used: {error.strerror}"
        for folder in (context.scratch, context.files.folder):
            if not os.access(folder, os.W_OK):
                return f"{folder} cannot be written: it is read-only, or another user's"
            if free[folder] < needed:
                there, limit = f"{free[folder] // 10**6} MB are free for {folder}", f"{needed // 10**6} MB are needed"
                return f"{there}, {limit} (DISTILLERY_MIN_FREE_BYTES)"
        return None


class BackOff:
    """The pause of one slot after jobs that failed early, one after the other.

    A slot with a fault (a lost device, a broken environment) fails each job within seconds, so without a pause it
    would claim most of them. One job may fail by its own fault; several in a row show that the slot has a fault.
    """

    def __init__(self, name: str, first_pause_s: float) -> None:
        self._name, self._first_pause_s = name, first_pause_s
        self._failed: set[str] = set()
        self.pause_s = 0.0

    def record(self, job_id: str, outcome: Outcome) -> None:
        if outcome == "progressed":
            self._reset()
        elif outcome == "failed_early":
            self._failed.add(job_id)
            if len(self._failed) >= JOBS_IN_A_ROW:
                self._lengthen()

    def _reset(self) -> None:
        if self.pause_s:
            log.warning("%s: jobs make progress again", self._name)
        self._failed.clear()
        self.pause_s = 0.0

    def _lengthen(self) -> None:
        if not self.pause_s:
            log.error("%s: several jobs in a row failed before any progress: pausing after each job", self._name)
        self.pause_s = min(2 * self.pause_s or self._first_pause_s, LONGEST_PAUSE_S)
