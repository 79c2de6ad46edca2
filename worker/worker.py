"""A whole worker: its slots, the periodic tasks, and the listener for wake-up messages."""

import logging
import threading
from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from base.memory import host_memory
from store import lifecycle, predictions, workers
from store.settings import Settings
from worker.celery_app import Listener, make_app, wake_workers
from worker.context import UNAVAILABLE, Options, WorkerContext
from worker.devices import Device, discover
from worker.periodic import Collection, Sweep
from worker.predictor import Predictor
from worker.slot import Slot
from worker.tracking import Tracker

log = logging.getLogger("distillery.worker")

WAIT_S = 1.0
MARGIN_S = 5.0
"""The time after the grace period in which the requeueing of jobs is written."""
MEMORY_SHARE = 0.8
"""The part of the memory that all engines may take together; the rest is for worker, server and mapped files."""
LEAVES_IN_S = 5.0
"""The longest time that a hanging database may delay each thread that has no job to requeue."""


class Worker:
    """A worker: call `start`, then `drain` and `stop`. It polls, and with `listens` also receives wake-up messages."""

    def __init__(
        self,
        settings: Settings,
        options: Options | None = None,
        *,
        listens: bool = True,
        devices: Sequence[Device] | None = None,
    ) -> None:
        self._app = make_app(settings.broker_url, self.wake_up)
        self.context = WorkerContext(settings, options or Options(), self._wake_workers if listens else self.wake_up)
        devices = devices or discover(settings.slots, self.context.options.threads)
        if self.context.engine_memory_bytes is None and (memory := host_memory()) is not None:
            self.context.engine_memory_bytes = int(MEMORY_SHARE * memory / len(devices))
        uri = self.context.options.mlflow_tracking_uri
        self._tracker = None if uri is None else Tracker(self.context, uri)
        on_end = None if self._tracker is None else self._tracker.note
        self.slots = [Slot(self.context, device, on_end) for device in devices]
        self._predictor = Predictor(self.context) if self.context.options.predictions else None
        self._sweep = Sweep(self.context, self.slots)
        self._collection = Collection(self.context)
        self._listener = Listener(self._app, self.is_idle) if listens else None
        self._began = False
        self._starter = threading.Thread(target=self._start, name="start", daemon=True)

    def wake_up(self) -> None:
        for slot in self.slots:
            slot.wake_up()
        if self._predictor:
            self._predictor.wake_up()

    def is_idle(self) -> bool:
        """True if a slot is free to claim a job."""
        return any(slot.is_free for slot in self.slots)

    def start(self) -> None:
        """Begin to work when the database answers. Returns at once."""
        self._starter.start()

    @property
    def has_polled(self) -> bool:
        """True if every slot has polled the database at least once."""
        return all(slot.has_polled for slot in self.slots)

    def drain(self) -> None:
        """Make all slots requeue their jobs at a checkpoint and end. Returns at once."""
        self.context.drain.request()
        self.wake_up()

    def stop(self) -> bool:
        """Drain, and wait for the end. Returns False if a slot has not ended in time: its guard ends the training."""
        self.drain()
        self._starter.join(LEAVES_IN_S)
        late = [slot for slot in self.slots if not slot.join(self.context.settings.stop_grace_s + MARGIN_S)]
        for slot in late:
            log.error("slot %s did not end in time with job %s", slot.device.name, slot.job)
        if self._predictor and not self._predictor.join(LEAVES_IN_S):
            log.warning("the predictor hangs, leaving without it")
        if self._tracker:
            self._tracker.stop()
        if self._listener:
            self._listener.stop()
        for name, ended in (
            ("sweep", self._sweep.stop(LEAVES_IN_S)),
            ("collection", self._collection.stop(LEAVES_IN_S)),
            ("sign-off", self._sign_off(LEAVES_IN_S)),
        ):
            if not ended:
                log.warning("the %s hangs, leaving without it", name)
        self.context.close()
        return not late

    def _start(self) -> None:
        if not self._database_answers():
            return
        self._began = True
        self._requeue_dead()
        for slot in self.slots:
            slot.start()
        if self._predictor:
            self._predictor.start()
        if self._tracker:
            self._tracker.start()
        self._sweep.start()
        self._collection.start()
        if self._listener:
            self._listener.start()
        log.info("worker %s is at work on %s", self.context.owner, ", ".join(slot.device.name for slot in self.slots))

    def _requeue_dead(self) -> None:
        """Before the first claim, so that a job that was interrupted keeps its place before those behind it."""
        try:
            self._sweep.requeue_dead()
        except UNAVAILABLE as error:
            log.warning("the jobs of dead workers are requeued by the sweep: %s", error)

    def _sign_off(self, timeout_s: float) -> bool:
        """Remove this worker's row. Returns False if that hangs; the row then expires by itself."""
        thread = threading.Thread(target=sign_off, args=(self.context,), name="sign-off", daemon=True)
        if self._began:
            thread.start()
            thread.join(timeout_s)
        return not thread.is_alive()

    def _wake_workers(self) -> None:
        """Wake workers on another thread: an unreachable broker would block this one for seconds."""
        threading.Thread(target=wake_workers, args=(self._app,), name="wake-up", daemon=True).start()

    def _database_answers(self) -> bool:
        """Wait for the database and its tables, which `python -m store migrate` may create later."""
        logged = False
        while not self.context.drain.requested:
            try:
                with self.context.database.connect() as connection:
                    lifecycle.has_claimable(connection, takeover=False)
                    predictions.has_claimable(connection)  # The newest table that is polled.
            except (*UNAVAILABLE, DBAPIError) as error:
                if not logged:
                    log.warning("waiting for the database and its tables (`python -m store migrate`): %s", error)
                logged = True
                self.context.drain.wait(WAIT_S)
            else:
                return True
        return False


def sign_off(context: WorkerContext) -> None:
    """Remove this worker's row. If that fails, the row expires by itself."""
    try:
        with context.database.begin() as connection:
            workers.delete_worker(connection, context.owner)
    except UNAVAILABLE as error:
        log.warning("left without signing off: %s", error)
