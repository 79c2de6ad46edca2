"""Where a slot gets its engines from: one is kept ready while the slot has nothing to do.

Importing torch takes seconds. So an engine is started before there is a job for it, imports, and waits for its order;
it costs memory meanwhile, and no time of a processor. One that dies or freezes while it waits is replaced, and costs no
job anything.
"""

import logging

from base.clock import boottime
from worker.desk import Desk
from worker.devices import Device, engine_environment
from worker.heart import SAFE_PART
from worker.session import Session

log = logging.getLogger("distillery.engines")


class Engines:
    """Of one slot, and used by its thread alone."""

    def __init__(self, desk: Desk, device: Device) -> None:
        self._desk, self.device = desk, device
        self._waiting: Session | None = None

    @property
    def is_ready(self) -> bool:
        """Whether a job would be begun at once."""
        return self._waiting is not None and self._waiting.is_ready

    def keep_one(self) -> None:
        """See to it that an engine waits, and goes on waiting for most of a lease: call this in good time again."""
        if self._waiting is not None and self._waiting.has_ended():
            said = self._waiting.printed().decode(errors="replace").strip()
            log.warning("%s: an engine ended while it waited, and said: %s", self.device.name, said or "nothing")
            self.let_go()
        deadline = boottime() + SAFE_PART * self._desk.settings.lease_s
        if self._waiting is not None:
            self._waiting.tick(deadline)
        elif self._desk.options.warm and not self._desk.drain.asked:
            self._waiting = self._start_ahead(deadline)

    def take(self) -> Session | None:
        """The engine that waits, which the caller has to end."""
        session, self._waiting = self._waiting, None
        if session is not None and session.has_ended():
            session.close()
            return None
        return session

    def start(self, deadline: float) -> Session:
        """A new one, which the caller has to end."""
        environment = engine_environment(self.device, self._desk.scratch)
        return Session(self._desk.options.engine, deadline=deadline, environment=environment)

    def let_go(self) -> None:
        """End the one that waits."""
        session, self._waiting = self._waiting, None
        if session is not None:
            session.close()

    def _start_ahead(self, deadline: float) -> Session | None:
        try:
            return self.start(deadline)
        except OSError as error:
            # The next job tries again, and is told.
            log.warning("%s: no engine can be started ahead: %s", self.device.name, error)
            return None
