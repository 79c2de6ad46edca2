"""What workers do for all, done by the server too: deadlines and wishes hold, and rings are repeated, without a worker.

Any number may sweep at once. What a silent owner left is ended only after one lease of unbroken contact with the
database: until then it may be we who heard nothing.
"""

import asyncio
import logging
from collections.abc import Callable

from sqlalchemy import Connection

from base.clock import Contact, boottime, jittered
from base.errors import DatabaseUnavailable, StorageFull
from store import lifecycle
from store.database import Database
from store.settings import Settings

log = logging.getLogger("distillery.sweep")


class Sweep:
    """`run` goes on until it is cancelled, whatever a round meets."""

    def __init__(self, database: Database, settings: Settings, ring: Callable[[], None]) -> None:
        self._database, self._settings, self._ring = database, settings, ring
        self._every_s = max(settings.look_s, settings.heartbeat_s)
        self._contact = Contact(longest_gap_s=settings.lease_s / 2)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(jittered(self._every_s))
            await self.once()

    async def once(self) -> None:
        """One round."""
        try:
            waiting = await self._database.write(self._sweep, boottime())
        except (DatabaseUnavailable, StorageFull):
            # Every request says so already; one voice is enough.
            self._contact.lost()
        except Exception:
            # The next round may go better; without any, and without a worker, nothing would end what is over.
            log.exception("a sweep failed")
        else:
            if waiting:
                log.debug("%d jobs wait although they are due for long: ringing again", len(waiting))
                self._ring()

    def _sweep(self, connection: Connection, asked_at: float) -> list[str]:
        """Returns the jobs that wait although they are due for long."""
        # Where we had to wait for our turn to write, owners may be waiting for theirs.
        if boottime() - asked_at > self._settings.heartbeat_s:
            self._contact.lost()
        self._contact.made()
        rescue = self._contact.unbroken_for(self._settings.lease_s)
        waiting = lifecycle.sweep(connection, takeover=rescue, rering_s=self._settings.rering_s)
        # Where we were frozen in our turn, owners had to wait for us.
        if rescue and boottime() - asked_at > self._settings.heartbeat_s:
            raise DatabaseUnavailable("the table did not answer within a heartbeat; those it kept out may be alive")
        return waiting
