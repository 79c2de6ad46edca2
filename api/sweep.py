"""The periodic sweep, which workers do too: it applies deadlines and requests while no worker runs.

Any number of processes may sweep at once. A job whose lease has expired is ended only after this process has reached
the database for one whole lease without a break: before that, missing heartbeats may be caused by the same outage.
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
    """The sweep of this process. `run` continues until it is cancelled; no exception ends it."""

    def __init__(self, database: Database, settings: Settings, wake_workers: Callable[[], None]) -> None:
        self._database, self._settings, self._wake_workers = database, settings, wake_workers
        self._every_s = max(settings.look_s, settings.heartbeat_s)
        self._contact = Contact(longest_gap_s=settings.lease_s / 2)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(jittered(self._every_s))
            await self.once()

    async def once(self) -> None:
        try:
            waiting = await self._database.write(self._sweep, boottime())
        except (DatabaseUnavailable, StorageFull):
            # Not logged: every request logs it.
            self._contact.lost()
        except Exception:
            # The next sweep may succeed. Without further sweeps, expired jobs would never end.
            log.exception("a sweep failed")
        else:
            if waiting:
                log.debug("%d jobs have been due for long: waking the workers again", len(waiting))
                self._wake_workers()

    def _sweep(self, connection: Connection, requested_at: float) -> list[str]:
        """Sweep once. Returns the jobs that have been due for long."""
        lease_s, heartbeat_s = self._settings.lease_s, self._settings.heartbeat_s
        with self._contact.takeover_gate(requested_at, lease_s=lease_s, heartbeat_s=heartbeat_s) as takeover:
            return lifecycle.sweep(
                connection,
                takeover=takeover,
                rering_s=self._settings.rering_s,
                max_running=self._settings.limit_jobs_running,
            )
