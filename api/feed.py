"""What the event streams of a process share: one query tells all of them which jobs have new events, and the events of
a job are read and rendered once for all who follow it. Other processes have a feed of their own.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Connection

from api.schemas import view_of
from base.errors import DatabaseUnavailable
from base.wire import EventView
from store import events
from store.database import Database
from store.events import Event

log = logging.getLogger("distillery.api")

POLL_S = 0.3
KEPT = 100
"""The newest messages of a job that are kept for its streams. Who is further behind reads the rows."""


class Followed:
    """A job that streams follow."""

    def __init__(self) -> None:
        self.streams = 0
        self.seq: int | None = None
        """The number of its newest event that the feed has seen; None before its first look."""
        self._messages: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._changed = asyncio.Event()

    def since(self, seq: int) -> list[tuple[int, bytes]] | None:
        """Return the messages of the events after a number, none if there are none. None: the rows have to be read."""
        if self.seq is None:
            return None
        if seq >= self.seq:
            return []
        if not self._messages or self._messages[0][0] > seq + 1:
            return None
        return [message for message in self._messages if message[0] > seq] or None

    async def change(self, seq: int, timeout_s: float) -> None:
        """Wait until there may be an event after a number, or for so long."""
        if self.seq is not None and self.seq > seq:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def add(self, seq: int, found: Sequence[Event]) -> None:
        if found and self._messages and found[0].seq != self._messages[-1][0] + 1:
            self._messages.clear()
        self._messages.extend((event.seq, message_of(event)) for event in found)
        self.seq = max(seq, found[-1].seq if found else 0)
        self._wake()

    def forget(self) -> None:
        """Let all streams read the rows themselves."""
        self.seq = None
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Feed:
    """The jobs that are followed, by id."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._followed: dict[str, Followed] = {}
        self._any = asyncio.Event()

    @contextmanager
    def following(self, job_id: str) -> Iterator[Followed]:
        """Have the feed look at a job for as long as the block lasts."""
        job = self._followed.setdefault(job_id, Followed())
        job.streams += 1
        self._any.set()
        try:
            yield job
        finally:
            job.streams -= 1
            if not job.streams:
                del self._followed[job_id]
                if not self._followed:
                    self._any.clear()

    async def run(self) -> None:
        """Look at all followed jobs again and again. Never ends."""
        while True:
            await self._any.wait()
            try:
                await self.look()
            except DatabaseUnavailable:
                # Each stream finds it out for itself, and ends.
                for job in self._followed.values():
                    job.forget()
            except Exception:
                log.exception("the feed of events will try again")
            await asyncio.sleep(POLL_S)

    async def look(self) -> None:
        """Read what is new of all followed jobs."""
        known = {job_id: job.seq for job_id, job in self._followed.items()}
        for job_id, (seq, found) in (await self._database.scan(_news, known)).items():
            job = self._followed.get(job_id)
            if job is None:
                continue
            if seq is None:
                job.forget()  # It was deleted.
            elif seq != job.seq:
                job.add(seq, found)


def message_of(event: Event) -> bytes:
    """Return an event as a server-sent one."""
    view: dict[str, Any] = view_of(EventView, event)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.type.encode(), to_json(view))


def _news(connection: Connection, known: dict[str, int | None]) -> dict[str, tuple[int | None, list[Event]]]:
    """Return the newest number of each job, None for one that is gone, and the events after the known one."""
    newest = events.newest_numbers(connection, list(known))
    found: dict[str, tuple[int | None, list[Event]]] = {}
    for job_id, seq in known.items():
        number = newest.get(job_id)
        is_new = number is not None and number != seq
        after = max(0, (number or 0) - KEPT) if seq is None else seq
        found[job_id] = number, events.list_events(connection, job_id, after, KEPT) if is_new else []
    return found
