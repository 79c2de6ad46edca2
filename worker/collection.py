"""The collector's turn: one worker of all collects what nobody needs any more, and each host trims its own cache."""

import logging

from store import cache, collections
from store.collections import Removed
from store.collector import Collector, Retention, collect
from worker.desk import AWAY, Desk
from worker.rounds import Rounds

log = logging.getLogger("distillery.collection")

FIRST_LOOK_S = 60.0
"""A worker that starts has better things to do."""
LOOKS = 4
"""How often anybody looks whether it is time, in the time between two collections."""


class Collection(Rounds):
    def __init__(self, desk: Desk) -> None:
        look_s = desk.settings.collect_every_s / LOOKS
        super().__init__("collection", look_s, min(FIRST_LOOK_S, look_s))
        self._desk = desk

    def round(self) -> None:
        try:
            removed = self.once()
        except AWAY as error:
            log.warning("nothing was collected, the next worker to look tries again: %s", error)
            return
        if removed:
            log.info("collected %s", told(removed))

    def once(self) -> Removed:
        """Trim this host's cache, and collect if it is time. Returns what went."""
        trimmed = self._trimmed()
        desk, settings = self._desk, self._desk.settings
        collector = Collector(desk.database, desk.files, Retention.of(settings), stopped=self._stop.is_set)
        with desk.database.connect() as connection:
            due = collections.is_due(connection, settings.collect_every_s)
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


def told(removed: Removed) -> str:
    """`2 blobs (1.3 MB), 1 logs (0.0 MB)`"""
    return ", ".join(f"{went['count']} {kind} ({went['bytes'] / 1e6:.1f} MB)" for kind, went in removed.items())
