"""The periodic tasks of a worker: the sweep, which handles the jobs of dead workers, and the garbage collection."""

import logging
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

from base.clock import jittered
from base.errors import WorkerLost
from store import cache, collections, lifecycle, workers
from store.attempts import is_owner
from store.collections import Removed
from store.collector import Collector, Retention, collect
from worker.context import UNAVAILABLE, WorkerContext
from worker.scratch import AttemptId, attempts_in_use, end_outlived, remove_dead
from worker.slot import Slot

log = logging.getLogger("distillery.periodic")

FIRST_CHECK_S = 60.0
"""The time after start until a worker checks whether a collection is due."""
CHECKS = 4
"""The number of checks by a worker, in the time between two collections, whether the next one is due."""


class PeriodicTask(ABC):
    """Runs on a thread of its own: after `first_s`, then again at most `every_s` after the end of each run."""

    def __init__(self, name: str, every_s: float, first_s: float = 0) -> None:
        self._name, self._every_s, self._first_s = name, every_s, first_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run_periodically, name=name, daemon=True)

    @abstractmethod
    def run(self) -> None:
        """Do the task once."""

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Request the end and wait for it. Returns False if the task has not ended in time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run_periodically(self) -> None:
        wait_s = self._first_s
        while not self._stop.wait(wait_s):
            try:
                self.run()
            except Exception:
                # The next run may succeed. Without further runs, abandoned jobs would wait and the disk would fill up.
                log.exception("the %s failed", self._name)
            wait_s = jittered(self._every_s)


class Sweep(PeriodicTask):
    """Ends abandoned jobs and engines, wakes workers for jobs that wait too long, and updates this worker's row."""

    def __init__(self, context: WorkerContext, slots: Sequence[Slot]) -> None:
        # A sweep takes the database's write lock, which a poll does not: it need not run more often than heartbeats.
        super().__init__("sweep", max(context.settings.look_s, context.settings.heartbeat_s))
        self._context, self._slots = context, slots

    def run(self) -> None:
        try:
            waiting = self.sweep()
        except UNAVAILABLE:
            # Not logged: the slots log it.
            self._context.contact.lost()
            return
        if waiting:
            log.debug("%d jobs have been due for long: waking workers again", len(waiting))
            self._context.wake_workers()

    def sweep(self) -> list[str]:
        """Sweep once. Returns the ids of jobs that have been due for long."""
        context, devices = self._context, [slot.describe() for slot in self._slots]
        current_job = next((device["job"] for device in devices if device["job"]), None)
        self.requeue_dead()
        self._end_outlived_engines()
        with context.begin() as (connection, takeover):
            workers.record_heartbeat(connection, context.owner, socket.gethostname(), devices, current_job)
            waiting = lifecycle.sweep(
                connection,
                takeover=takeover,
                rering_s=context.settings.rering_s,
                max_running=context.settings.limit_jobs_running,
            )
        return waiting

    def requeue_dead(self) -> None:
        """Requeue the jobs of workers that were killed on this host."""
        remove_dead(self._context.scratch, self._requeue)

    def _end_outlived_engines(self) -> None:
        """End engines of this host that have lost their job."""
        in_use = attempts_in_use(self._context.scratch)
        if not in_use:
            return
        with self._context.database.connect() as connection:
            outlived = [one for one in in_use if not is_owner(connection, one.job_id, one.fence)]
        for attempt in outlived:
            end_outlived(attempt, in_use[attempt])

    def _requeue(self, dead: AttemptId) -> None:
        """Requeue the job of a worker that was killed on this host. The attempt counts: the job may be the cause."""
        error = WorkerLost("the worker's process was killed", "the job continues from its last checkpoint").as_dict()
        with self._context.database.begin() as connection:
            was_current = lifecycle.finish_failed(connection, dead.job_id, dead.fence, error, retry_in_s=0)
        if was_current:
            self._context.wake_workers()
            log.warning("job %s: its worker on this host is dead (fence %d), requeued", dead.job_id, dead.fence)


class Collection(PeriodicTask):
    """Collects garbage when it is due and no other worker does, and trims the cache of this host."""

    def __init__(self, context: WorkerContext) -> None:
        check_s = context.settings.collect_every_s / CHECKS
        super().__init__("collection", check_s, min(FIRST_CHECK_S, check_s))
        self._context = context

    def run(self) -> None:
        try:
            removed = self.collect()
        except UNAVAILABLE as error:
            log.warning("nothing was collected, the next worker that checks tries again: %s", error)
            return
        if removed:
            log.info("collected %s", summary(removed))

    def collect(self) -> Removed:
        """Trim this host's cache, and collect if it is due. Returns what was removed."""
        trimmed = self._trim_cache()
        context, settings = self._context, self._context.settings
        collector = Collector(context.database, context.files, Retention.of(settings), stopped=self._stop.is_set)
        with context.database.connect() as connection:
            due = collections.is_due(connection, settings.collect_every_s)
        if due:
            collect(collector, settings.collect_every_s)
        for fault in collector.faults:
            log.warning("not everything could be collected: %s", fault)
        return collector.removed | trimmed

    def _trim_cache(self) -> Removed:
        try:
            trimmed = cache.trim(self._context.cache, self._context.settings.cache_max_bytes)
        except OSError as error:
            # An entry that this host cannot remove must not stop the collection of all hosts' files.
            log.warning("the cache could not be trimmed: %s", error)
            return {}
        return {"cache": {"count": len(trimmed), "bytes": sum(one.size.bytes for one in trimmed)}} if trimmed else {}


def summary(removed: Removed) -> str:
    """Return a text such as `2 blobs (1.3 MB), 1 logs (0.0 MB)`."""
    return ", ".join(f"{size['count']} {kind} ({size['bytes'] / 1e6:.1f} MB)" for kind, size in removed.items())
