"""Places for inspections: who gets the next one, and who has to come again.

A regular place is for an inspection of any length. They are dealt by turns to those who ask, so that ten files of one
asker are one file ahead of another's. The trial place is for those that have just come: most inspections take seconds,
and must not wait behind two that take half an hour. Who still has it after `TRIAL_S`, and is not given a regular place,
leaves it as soon as another waits; its work is ended, and begins again in a regular place.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")

TRIAL_S = 8.0
"""A child imports for two seconds, more on a busy machine, and then reads some thousand pictures a second."""
MOST_WAITING, MOST_OF_ONE = 128, 32
"""Inspections that may wait for a place: of all askers, and of one."""
RETRY_AFTER_S = 10
REMEMBERED = 1_000
"""The askers whose last turn is remembered."""


class Busy(Exception):
    """Too many inspections wait already."""

    retry_after_s: ClassVar[int] = RETRY_AFTER_S


class AskerBusy(Busy):
    """Too many of this asker's."""


@dataclass(eq=False)
class _Ticket:
    """One inspection that waits for a place, or has one."""

    asker: str
    number: int
    place: Literal["regular", "trial"] | None = None
    may_try: bool = True
    """False after it was ended in the trial place."""
    began_at: float = 0.0
    placed: asyncio.Event = field(default_factory=asyncio.Event)
    leaves: asyncio.Event = field(default_factory=asyncio.Event)


class Places:
    """Some regular places and a trial place, and those who wait for them. Of one event loop."""

    def __init__(
        self, regular: int, trial_s: float = TRIAL_S, most_waiting: int = MOST_WAITING, most_of_one: int = MOST_OF_ONE
    ) -> None:
        self._regular, self._trial_s = regular, trial_s
        self._most_waiting, self._most_of_one = most_waiting, most_of_one
        self._tickets: list[_Ticket] = []
        self._turns: dict[str, int] = {}
        """The number of each asker's last turn; the longest ago first."""
        self._count = 0

    @property
    def is_free(self) -> bool:
        """True if an inspection would begin at once."""
        placed = sum(ticket.place is not None for ticket in self._tickets)
        return placed == len(self._tickets) and placed <= self._regular

    def require_room(self, asker: str) -> None:
        """Raise Busy or AskerBusy if one more of this asker may not wait."""
        waiting = [ticket for ticket in self._tickets if ticket.place is None]
        own = sum(ticket.asker == asker for ticket in waiting)
        if own >= self._most_of_one:
            raise AskerBusy(f"{own} inspections of yours wait already; send this again when some have ended")
        if len(waiting) >= self._most_waiting:
            raise Busy(f"{len(waiting)} inspections wait already; send this again later")

    async def run(self, asker: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of `work`, which is begun when there is a place, and perhaps a second time. Raises Busy."""
        self.require_room(asker)
        self._count += 1
        ticket = _Ticket(asker, self._count)
        self._tickets.append(ticket)
        try:
            self._deal()
            await ticket.placed.wait()
            if ticket.place == "trial":
                task = asyncio.create_task(work())
                if await _ended_before(task, ticket.leaves.wait()):
                    return task.result()
                ticket.place, ticket.may_try = None, False
                ticket.placed.clear()
                self._deal()
                await ticket.placed.wait()
            return await work()
        finally:
            self._tickets.remove(ticket)
            self._deal()

    def _deal(self) -> None:
        """Give free places to those whose turn it is."""
        now = asyncio.get_running_loop().time()
        held = Counter(ticket.asker for ticket in self._tickets if ticket.place == "regular")
        trying = next((ticket for ticket in self._tickets if ticket.place == "trial"), None)
        waiting = [ticket for ticket in self._tickets if ticket.place is None]
        # Who has the trial place may keep what is done so far.
        wanting = [*waiting, *([trying] if trying is not None and not trying.leaves.is_set() else [])]
        while wanting and held.total() < self._regular:
            chosen = min(wanting, key=lambda one: (held[one.asker], self._turns.get(one.asker, 0), one.number))
            wanting.remove(chosen)
            held[chosen.asker] += 1
            self._place(chosen, "regular", now)
        new = [ticket for ticket in self._tickets if ticket.place is None and ticket.may_try]
        trying = next((ticket for ticket in self._tickets if ticket.place == "trial"), None)
        if trying is None and new:
            chosen = min(new, key=lambda one: (self._turns.get(one.asker, 0), one.number))
            self._place(chosen, "trial", now)
            asyncio.get_running_loop().call_later(self._trial_s + 0.01, self._deal)
        elif trying is not None and new and now - trying.began_at >= self._trial_s:
            trying.leaves.set()

    def _place(self, ticket: _Ticket, place: Literal["regular", "trial"], now: float) -> None:
        self._count += 1
        self._turns.pop(ticket.asker, None)
        self._turns[ticket.asker] = self._count
        if len(self._turns) > REMEMBERED:
            del self._turns[next(iter(self._turns))]
        ticket.place, ticket.began_at = place, now
        ticket.placed.set()


async def _ended_before(task: asyncio.Task[Any], other: Coroutine[Any, Any, Any]) -> bool:
    """Wait for a task or for something else, and cancel the task in that case, or when the waiting itself is cancelled.
    Returns True if the task came to an end of its own."""
    waiting = asyncio.create_task(other)
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # Retrieved, so that asyncio does not log it.
