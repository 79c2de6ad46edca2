"""What any worker does for all: end what dead owners left, ring again for what waits too long, say who is here."""

import logging
import socket
from collections.abc import Callable, Sequence

from base.errors import WorkerLost
from store import lifecycle, workers
from store.attempts import is_owner
from worker import scratch
from worker.desk import AWAY, Desk
from worker.rounds import Rounds
from worker.scratch import Lock
from worker.slot import Slot

log = logging.getLogger("distillery.sweep")


class Sweep(Rounds):
    def __init__(self, desk: Desk, slots: Sequence[Slot], ring: Callable[[], None]) -> None:
        # A sweep takes the write lock, where a look takes none: no need to do it more often than a heart beats.
        super().__init__("sweep", max(desk.settings.look_s, desk.settings.heartbeat_s))
        self._desk, self._slots, self._ring = desk, slots, ring

    def round(self) -> None:
        try:
            waiting = self.once()
        except AWAY:
            # The slots say so already; one voice is enough.
            self._desk.contact.lost()
            return
        if waiting:
            log.debug("%d jobs wait although they are due for long: ringing again", len(waiting))
            self._ring()

    def once(self) -> list[str]:
        """One round; returns the jobs that wait although they are due for long."""
        desk, devices = self._desk, [slot.told() for slot in self._slots]
        current_job = next((device["job"] for device in devices if device["job"]), None)
        for dead in scratch.sweep(desk.scratch):
            self._hand_on(dead)
        self._end_outlived()
        with desk.begin() as (connection, rescue):
            workers.record_heartbeat(connection, desk.owner, socket.gethostname(), devices, current_job)
            waiting = lifecycle.sweep(connection, takeover=rescue, rering_s=desk.settings.rering_s)
        return waiting

    def _end_outlived(self) -> None:
        """End engines that have lost their job, and that nobody else ends: their guard froze and their worker died."""
        locks = scratch.held(self._desk.scratch)
        if not locks:
            return
        with self._desk.database.connect() as connection:
            outlived = [lock for lock in locks if not is_owner(connection, lock.job_id, lock.fence)]
        for lock in outlived:
            if scratch.end(lock):
                log.warning("job %s: an engine outlived its right to run (fence %d), ended", lock.job_id, lock.fence)

    def _hand_on(self, dead: Lock) -> None:
        """Its worker was killed on this host. That costs an attempt: the job may be what killed it."""
        error = WorkerLost("the worker's process was killed", "the job goes on from its last checkpoint").as_dict()
        with self._desk.database.begin() as connection:
            was_current = lifecycle.finish_failed(connection, dead.job_id, dead.fence, error, retry_in_s=0)
        if was_current:
            self._ring()
            log.warning("job %s: its worker on this host is dead (fence %d), handed on", dead.job_id, dead.fence)


def leave(desk: Desk) -> None:
    """Say goodbye. A worker that cannot is seen no more, which says the same a little later."""
    try:
        with desk.database.begin() as connection:
            workers.delete_worker(connection, desk.owner)
    except AWAY as error:
        log.warning("left without a goodbye: %s", error)
