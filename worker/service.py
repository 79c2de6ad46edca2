"""A whole worker: its slots, the sweep, the collection, and somebody who listens to the bell."""

import logging
import threading
from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from store import lifecycle
from store.settings import Settings
from worker.app import Listener, make_app, ring_others
from worker.collection import Collection
from worker.desk import AWAY, Desk, Options
from worker.devices import Device, discover
from worker.slot import Slot
from worker.sweep import Sweep, leave

log = logging.getLogger("distillery.worker")

WAIT_S = 1.0
MARGIN_S = 5.0
"""After the grace period: to write down that the job was handed back."""

LEAVES_IN_S = 5.0
"""How long a table that hangs may hold up each of those that have nothing to hand back."""


class Worker:
    """`start`, then `drain` and `stop`. With `listens` it hears the bell; without, it looks by itself only."""

    def __init__(
        self,
        settings: Settings,
        options: Options | None = None,
        *,
        listens: bool = True,
        devices: Sequence[Device] | None = None,
    ) -> None:
        self._app = make_app(settings.broker_url, self.ring)
        self.desk = Desk(settings, options or Options(), self._ring_others if listens else self.ring)
        self.slots = [
            Slot(self.desk, device) for device in devices or discover(settings.slots, self.desk.options.threads)
        ]
        self._sweep = Sweep(self.desk, self.slots, self.desk.ring)
        self._collection = Collection(self.desk)
        self._listener = Listener(self._app, self.is_idle) if listens else None
        self._began = False
        self._starter = threading.Thread(target=self._start, name="start", daemon=True)

    def ring(self) -> None:
        for slot in self.slots:
            slot.ring()

    def is_idle(self) -> bool:
        """Whether a ring would find somebody here with nothing to do."""
        return any(slot.is_free for slot in self.slots)

    def start(self) -> None:
        """Begin to work as soon as the database is there. Returns at once."""
        self._starter.start()

    @property
    def looked(self) -> bool:
        """Whether every slot has looked at the table at least once."""
        return all(slot.looked for slot in self.slots)

    def drain(self) -> None:
        """Ask all slots to hand back their jobs at a checkpoint and leave. Returns at once."""
        self.desk.drain.ask()
        self.ring()

    def stop(self) -> bool:
        """Drain and wait for the end. False when a slot had to be left behind: its guard ends the training."""
        self.drain()
        self._starter.join(LEAVES_IN_S)
        late = [slot for slot in self.slots if not slot.join(self.desk.settings.stop_grace_s + MARGIN_S)]
        for slot in late:
            log.error("slot %s did not leave in time with job %s", slot.device.name, slot.job)
        if self._listener:
            self._listener.stop()
        for name, ended in (
            ("the sweep", self._sweep.stop(LEAVES_IN_S)),
            ("the collection", self._collection.stop(LEAVES_IN_S)),
            ("the goodbye", self._say_goodbye(LEAVES_IN_S)),
        ):
            if not ended:
                log.warning("%s hangs, and is left behind", name)
        self.desk.close()
        return not late

    def _start(self) -> None:
        if not self._database_answers():
            return
        self._began = True
        for slot in self.slots:
            slot.start()
        self._sweep.start()
        self._collection.start()
        if self._listener:
            self._listener.start()
        log.info("worker %s is at work on %s", self.desk.owner, ", ".join(slot.device.name for slot in self.slots))

    def _say_goodbye(self, timeout_s: float) -> bool:
        """False when the table has not heard it in time: it is frozen, and sees soon enough that we are silent."""
        goodbye = threading.Thread(target=leave, args=(self.desk,), name="goodbye", daemon=True)
        if self._began:
            goodbye.start()
            goodbye.join(timeout_s)
        return not goodbye.is_alive()

    def _ring_others(self) -> None:
        """On a thread of its own: a broker that is away answers only after seconds."""
        threading.Thread(target=ring_others, args=(self._app,), name="ring", daemon=True).start()

    def _database_answers(self) -> bool:
        """Wait for the database and its tables: `python -m store migrate` makes them, and may come later."""
        told = False
        while not self.desk.drain.asked:
            try:
                with self.desk.database.connect() as connection:
                    lifecycle.has_claimable(connection, takeover=False)
            except (*AWAY, DBAPIError) as error:
                if not told:
                    log.warning("waiting for the database and its tables (`python -m store migrate`): %s", error)
                told = True
                self.desk.drain.wait(WAIT_S)
            else:
                return True
        return False
