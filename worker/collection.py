"""The collector's turn: one worker of all collects what nobody needs any more, and each host trims its own cache."""

import logging
import random
import threading

from store import cache, collections
from store.collector import Collector, Removed, Retention, collect
from worker.desk import AWAY, Desk
from worker.slot import JITTER

log = logging.getLogger("distillery.collection")

FIRST_LOOK_S = 60.0
"""A worker that starts has better things to do."""
LOOKS = 4
"""How often anybody looks whether it is time, in the time between two collections."""


class Collection:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._look_s = desk.settings.collect_every_s / LOOKS
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collection", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ask it to end and wait for that; False when it has not come in time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def once(self) -> Removed:
        """Trim this host's cache, and collect if it is time. Returns what went."""
        trimmed = self._trimmed()
        desk, settings = self._desk, self._desk.settings
        collector = Collector(desk.database, desk.files, Retention.of(settings), stopped=self._stop.is_set)
        with desk.database.connect() as connection:
            due = collections.due(connection, settings.collect_every_s)
        if due:
            collect(collector, settings.collect_every_s)
        for fault in collector.faults:
            log.warning("not all could be collected: %s", fault)
        return collector.removed | trimmed

    def _trimmed(self) -> Removed:
        try:
            gone = cache.trim(self._desk.cache, self._desk.settings.cache_max_bytes)
        except OSError as error:
            # One entry that this host may not touch is no reason to let the blobs of all hosts pile up.
            log.warning("the cache could not be trimmed: %s", error)
            return {}
        return {"cache": {"count": len(gone), "bytes": sum(entry.size.bytes for entry in gone)}} if gone else {}

    def _run(self) -> None:
        wait_s = min(FIRST_LOOK_S, self._look_s)
        while not self._stop.wait(wait_s):
            try:
                if removed := self.once():
                    log.info("collected %s", told(removed))
            except AWAY as error:
                log.warning("nothing was collected, the next worker to look tries again: %s", error)
            except Exception:
                # The next round may go better; without any, the disk would fill up.
                log.exception("a collection failed")
            wait_s = self._look_s * random.uniform(1 - JITTER, 1)  # noqa: S311


def told(removed: Removed) -> str:
    """`2 blobs (1.3 MB), 1 logs (0.0 MB)`"""
    return ", ".join(f"{went['count']} {kind} ({went['bytes'] / 1e6:.1f} MB)" for kind, went in removed.items())
