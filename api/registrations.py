"""Registrations: rows whose files this server inspects.

A row is made before its file is inspected, and the inspection belongs to the row: it goes on when the client closes the
connection, and ends when the row is deleted. The server holds a lease on each of its rows and extends it. When a server
dies, another one, or the same one when it is back, takes its rows over after the lease has expired.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from anyio import to_thread
from pydantic import BaseModel
from sqlalchemy import Connection

from api.inspections import FOREIGN_AFTER_S, Inspections, OnProgress, Refused
from api.places import Busy
from api.problems import InspectionsBusy, NotFound, Problem, ServerError, StorageFull, Unusable
from base.clock import jittered
from base.errors import DatabaseUnavailable, OutOfMemory
from base.errors import StorageFull as DiskFull
from base.folders import HOST, remove_abandoned
from base.text import STORED
from store.database import Database
from store.idempotency import Once
from store.registry import Entry, NewEntry, Registry
from store.settings import Settings

log = logging.getLogger("distillery.registrations")

WAIT_S = 5.0
"""The time for which a request waits for its inspection. A refusal within it leaves no row."""
START_S = 5.0
"""The longest time that does not count as such: a child that starts at once imports torch before it opens the file."""
RENEW_S = 2.0
"""The longest time between two renewals, which also write the progress and notice that a row is gone."""
AT_ONCE = 8
"""The inspections that a server takes over while it has as many itself."""
MAX_ATTEMPTS = 3
RETRY_S = 10.0
LOST = {
    "code": "unusable",
    "message": f"the server ended {MAX_ATTEMPTS} times while it inspected the file",
    "hint": "if the file did not do that, register it again; the servers' logs say how they ended",
    "errors": [],
}

E = TypeVar("E", bound=Entry)


class New(Protocol):
    """What the bodies of all registrations have."""

    name: str
    labels: dict[str, str]

    def model_dump(self, *, mode: str, exclude_unset: bool) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Inspected:
    """What an inspection has found, as it is stored."""

    facts: dict[str, Any]
    warnings: list[dict[str, Any]]
    more: dict[str, Any] = field(default_factory=dict)
    """Further columns of the kind's table."""


@dataclass(frozen=True)
class Kind(Generic[E]):
    """A kind of registered files."""

    registry: Registry[E]
    body: type[BaseModel]
    """Of its registration."""
    facts: type[BaseModel]
    inspect: Callable[[Any, str, Inspections, OnProgress], Awaitable[Inspected]]
    """Inspects a file, by the body and the digest. Raises Refused, or a Problem if it is not to be registered."""


@dataclass
class Made(Generic[E]):
    """How a request makes a row, and whether it has made it before."""

    once: Once | None = None
    max_inspections: int | None = None
    note: Callable[[Connection, E], None] | None = None
    """Called in the transaction that makes the row."""
    before: bool = False


@dataclass
class _Held(Generic[E]):
    """An inspection of this server."""

    kind: Kind[E]
    entry: E
    asker: str
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the file is opened."""
    progress: dict[str, int] | None = None
    answered: bool = False
    """True if no request waits for the outcome: a refusal is then kept in the row."""
    ending: bool = False
    """True if the outcome is known and being written."""
    task: asyncio.Task[E] = field(init=False)

    def count(self, done: int, total: int) -> None:
        self.begun.set()
        self.progress = {"done": done, "total": total} if total else None


class Registrations:
    """The rows that this server inspects. `run` continues until it is cancelled; no exception ends it."""

    def __init__(self, db: Database, inspections: Inspections, settings: Settings, kinds: Sequence[Kind[Any]]) -> None:
        self._db, self._inspections, self._kinds = db, inspections, kinds
        self._lease_s, self._every_s = settings.lease_s, min(settings.heartbeat_s, RENEW_S)
        self._owner = f"{HOST}:{os.getpid()}:{secrets.token_hex(4)}"
        self._held: dict[str, _Held[Any]] = {}
        self.wait_s = WAIT_S

    async def register(
        self, kind: Kind[E], new: New, project: str, digest: str, made: Made[E] | None = None, asker: str = ""
    ) -> E:
        """Make a row and inspect its file. Returns the row when that has ended, or after `wait_s` as it is then. The
        start of the child does not count, if it starts at once. The row of a request that was executed before is
        returned as it is. `asker` takes turns with others.

        Raises NameTaken, LimitReached, IdempotencyConflict, or Busy if too many inspections wait; and, within that
        time, Refused or the Problem for which the row was deleted again.
        """
        self._inspections.inspector.require_room(kind.facts, asker)
        request = new.model_dump(mode="json", exclude_unset=True)
        entry = NewEntry(project, new.name, digest, request, dict(new.labels))
        made = made or Made()
        starts = self._inspections.inspector.is_free(kind.facts)
        row = await self._db.write(self._add, kind, entry, made)
        if made.before:
            return row
        held = self._hold(kind, row, asker)
        begun = asyncio.create_task(held.begun.wait())
        try:
            if starts:
                await asyncio.wait({held.task, begun}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({held.task}, timeout=self.wait_s)
            if held.ending:
                await asyncio.wait({held.task})
        finally:
            held.answered = True
            begun.cancel()
        if not held.task.done():
            return await self._db.read(kind.registry.get, project, held.entry.id)
        if held.task.cancelled():
            raise NotFound(f"the {kind.registry.kind} {new.name!r} was deleted while it was inspected")
        return held.task.result()

    def cancel(self, entry_id: str) -> None:
        """End the inspection of a row that was deleted, if this server does it. Others notice it at their renewal."""
        held = self._held.pop(entry_id, None)
        if held is not None:
            held.task.cancel()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(jittered(self._every_s))
            try:
                await self.once()
            except (DatabaseUnavailable, DiskFull):
                pass  # Not logged: every request logs it.
            except Exception:
                log.exception("the leases of inspections were not renewed")

    async def once(self) -> None:
        """Renew the leases of this server's rows, end the inspections of rows that are gone, and take others over."""
        held = dict(self._held)
        if not held and not await self._db.read(self._has_expired):
            return
        progress = {entry_id: one.progress for entry_id, one in held.items()}
        owned, claimed = await self._db.write(self._renew_and_claim, progress)
        for entry_id in held.keys() - owned:
            if not held[entry_id].ending:
                self.cancel(entry_id)
        for kind, entry in claimed:
            log.info("takes over the inspection of %s, attempt %d", entry.id, entry.attempts)
            self._hold(kind, entry, entry.project).answered = True
        if claimed:
            # The server that died may have been one of this host.
            await to_thread.run_sync(remove_abandoned, self._inspections.inspector.scratch, FOREIGN_AFTER_S)

    async def stop(self) -> None:
        """End all inspections, and let other servers begin them again at once."""
        held = list(self._held.values())
        self._held.clear()
        for one in held:
            one.task.cancel()
        if held:
            await asyncio.wait([one.task for one in held])
        for one in held:
            if one.task.cancelled():
                try:
                    await self._db.write(one.kind.registry.release, one.entry, self._owner, 0.0)
                except (DatabaseUnavailable, DiskFull):
                    log.warning("the inspection of %s is begun again when its lease has expired", one.entry.id)

    def _add(self, connection: Connection, kind: Kind[E], new: NewEntry, made: Made[E]) -> E:
        own = self._owner, self._lease_s, made.max_inspections
        entry, created = kind.registry.register_once(connection, made.once, new, *own)
        made.before = not created
        if created and made.note is not None:
            made.note(connection, entry)
        return entry

    def _has_expired(self, connection: Connection) -> bool:
        return any(kind.registry.has_expired(connection) for kind in self._kinds)

    def _renew_and_claim(
        self, connection: Connection, progress: dict[str, dict[str, int] | None]
    ) -> tuple[set[str], list[tuple[Kind[Any], Entry]]]:
        owned: set[str] = set()
        claimed: list[tuple[Kind[Any], Entry]] = []
        for kind in self._kinds:
            owned |= kind.registry.renew(connection, self._owner, self._lease_s, progress)
        for kind in self._kinds:
            limit = max(0, AT_ONCE - len(owned) - len(claimed))
            given = self._owner, self._lease_s, limit, MAX_ATTEMPTS, LOST
            claimed += [(kind, entry) for entry in kind.registry.claim_expired(connection, *given)]
        return owned, claimed

    def _hold(self, kind: Kind[E], entry: E, asker: str) -> _Held[E]:
        held = self._held[entry.id] = _Held(kind, entry, asker)
        held.task = asyncio.create_task(self._inspect(held))
        held.task.add_done_callback(lambda task: self._drop(held, task))
        return held

    def _drop(self, held: _Held[E], task: asyncio.Task[E]) -> None:
        if self._held.get(held.entry.id) is held:
            del self._held[held.entry.id]
        if (
            not task.cancelled()
            and (error := task.exception())
            and not isinstance(error, Problem | Refused | Busy | DiskFull)
        ):
            log.error("the inspection of %s failed", held.entry.id, exc_info=error)

    async def _inspect(self, held: _Held[E]) -> E:
        """Inspect a row's file and write the outcome. Returns the row; raises what was found wrong."""
        kind, entry = held.kind, held.entry
        try:
            body = kind.body.model_validate(entry.request, context=STORED)
            found = await kind.inspect(body, entry.sha256, self._inspections.of(held.asker), held.count)
        except DatabaseUnavailable:
            raise  # Nothing can be written: the row is taken over when its lease has expired.
        except Exception as error:
            held.ending = True
            await self._refuse(held, error)
            raise
        held.ending = True
        ready = {"facts": found.facts, "warnings": found.warnings, **found.more}
        written = await self._db.write(kind.registry.finish, entry, self._owner, ready)
        if written is None:
            raise NotFound(f"the {kind.registry.kind} {entry.name!r} was deleted while it was inspected")
        return written

    async def _refuse(self, held: _Held[Any], error: Exception) -> None:
        """Delete the row if a request waits for it; else keep the reason in it, or let it be inspected once more."""
        table, entry = held.kind.registry, held.entry
        may_succeed = isinstance(error, DiskFull | Busy) or (isinstance(error, Refused) and _is_worth_another(error))
        if not held.answered:
            await self._db.write(table.withdraw, entry, self._owner)
        elif may_succeed and entry.attempts < MAX_ATTEMPTS:
            await self._db.write(table.release, entry, self._owner, RETRY_S, stored_error(error))
        else:
            await self._db.write(table.refuse, entry, self._owner, stored_error(error))


def _is_worth_another(refused: Refused) -> bool:
    """True if the child crashed. What took too long or too much memory once would do so again."""
    return not refused.final and refused.code not in ("timeout", OutOfMemory.code)


def stored_error(error: Exception) -> dict[str, Any]:
    """Return the reason of a refusal as a row keeps it: code, message, hint and faults of the answer to a POST."""
    problem: Problem = ServerError("an unexpected error; the server's log has it")
    if isinstance(error, Problem):
        problem = error
    elif isinstance(error, Refused):
        problem = Unusable.of(error)
    elif isinstance(error, DiskFull):
        problem = StorageFull.of(error)
    elif isinstance(error, Busy):
        problem = InspectionsBusy.of(error)
    return {
        "code": problem.code,
        "message": problem.detail,
        "hint": problem.extra.get("hint"),
        "errors": [fault.as_dict() for fault in problem.faults],
    }
