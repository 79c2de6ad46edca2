"""The limits of projects, as one API process applies them: what it knows of them, and the two that are its own.

Requests in a second and open event streams are counted in memory, by each process for itself. All other limits are
checked by the store, in the transaction that makes a row. What a process knows of a project's limits is at most
`FRESH_S` old.
"""

import math
import time
from collections import Counter
from typing import Any

from anyio import to_thread
from sqlalchemy import Connection
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from api.auth import Member
from api.problems import LimitReached
from store import errors, limits
from store.database import Database
from store.errors import NotFound
from store.file_store import FileStore
from store.limits import Limits, Room
from store.settings import Settings

FRESH_S = 4.0
COUNTED_S = 30.0
"""The age at which the bytes of a project's files are counted again: what jobs make in between is not refused."""
SCOPES = {"event_streams": "process", "requests_per_s": "process", "upload_bytes": "upload"}
"""What a limit counts in; all others count in the whole service."""


class Limiter:
    """Knows the limits of each project, and counts requests and streams."""

    def __init__(self, database: Database, files: FileStore, settings: Settings) -> None:
        self._database, self._files = database, files
        self._defaults = limits.defaults(settings)
        self._own: dict[str, tuple[Limits, dict[str, int], float]] = {}
        self._bytes: dict[str, tuple[int, float]] = {}
        self._sizes: dict[str, int] = {}
        self._streams: Counter[str] = Counter()
        self._next: dict[str, float] = {}
        """When a project's requests so far are paid for at its rate, by time.monotonic()."""

    async def of(self, project: str) -> Limits:
        """Return the limits of a project."""
        known = self._own.get(project)
        if known is None or time.monotonic() - known[2] > FRESH_S:
            known = await self._read(project)
        return known[0]

    def forget(self, project: str) -> None:
        """Read the limits of a project again: this process has changed them."""
        self._own.pop(project, None)

    async def admit(self, caller: Member) -> None:
        """Count a request. Raises LimitReached, with the time to come again.

        A caller without a row of `keys` is the operator, or there are no keys: these are never refused.
        """
        if caller.key_id is None:
            return
        rate = (await self.of(caller.project)).requests_per_s
        if rate is None:
            return
        # A request costs 1 / rate seconds, and up to a second may be spent at once.
        now = time.monotonic()
        paid = max(self._next.get(caller.project, now), now) + 1 / rate
        if paid > now + 1 + 1e-9:
            after_s = max(1, math.ceil(paid - now - 1))
            raise _reached("requests_per_s", rate, rate, after_s)
        self._next[caller.project] = paid

    async def open_stream(self, project: str) -> None:
        """Count an event stream that begins; `Counted` counts its end. Raises LimitReached."""
        bound = (await self.of(project)).event_streams
        if bound is not None and self._streams[project] >= bound:
            raise _reached("event_streams", bound, self._streams[project], 5)
        self._streams[project] += 1

    def close_stream(self, project: str) -> None:
        self._streams[project] -= 1
        if not self._streams[project]:
            del self._streams[project]

    async def room(self, project: str) -> Room | None:
        """Return the bytes that a project may store; None without a limit, because counting them takes time."""
        bound = (await self.of(project)).bytes_stored
        return None if bound is None else Room(bound, await self.bytes_beside_uploads(project))

    async def bytes_beside_uploads(self, project: str) -> int:
        """Return the bytes of a project's files without those of uploads, as they were at most `COUNTED_S` ago."""
        count, counted_at = self._bytes.get(project, (0, float("-inf")))
        if time.monotonic() - counted_at > COUNTED_S:
            count = await to_thread.run_sync(self._count_bytes, project)
            self._bytes[project] = count, time.monotonic()
        return count

    async def usage(self, project: str) -> dict[str, dict[str, Any]]:
        """Return each limit of a project: its value, what is used, and what it counts in. Raises NotFound."""
        bounds, own, _ = await self._read(project, must_exist=True)
        others = await self.bytes_beside_uploads(project)

        def count(connection: Connection) -> dict[str, int | None]:
            return {
                "jobs_queued": limits.count_waiting(connection, project),
                "jobs_running": limits.count_running(connection, project),
                "bytes_stored": others + limits.bytes_of_uploads(connection, project),
                "upload_bytes": None,
                "event_streams": self._streams[project],
                "inspections": limits.count_inspections(connection, project),
                "requests_per_s": self._requests(project, bounds.requests_per_s),
            }

        used = await self._database.read(count)
        return {
            name: {
                "value": value,
                "used": used[name],
                "is_default": name not in own,
                "counts_in": SCOPES.get(name, "project"),
            }
            for name, value in bounds.model_dump().items()
        }

    def _requests(self, project: str, rate: int | None) -> int | None:
        """Return the requests of the last second, as far as they are not paid for."""
        ahead_s = max(0.0, self._next.get(project, 0.0) - time.monotonic())
        return None if rate is None else round(ahead_s * rate)

    async def _read(self, project: str, must_exist: bool = False) -> tuple[Limits, dict[str, int], float]:
        try:
            own = await self._database.read(limits.own, project)
        except NotFound:
            if must_exist:
                raise
            own = {}  # Its keys are gone as well, but a process remembers them for some seconds.
        known = self._defaults.model_copy(update=own), own, time.monotonic()
        self._own[project] = known
        return known

    def _count_bytes(self, project: str) -> int:
        with self._database.connect() as connection:
            count = limits.bytes_of_jobs(connection, project)
            others = limits.other_blobs(connection, project)
        return count + sum(map(self._size, others))

    def _size(self, digest: str) -> int:
        """Return the bytes of a blob whose upload and job are deleted. What a blob has never changes."""
        if not self._sizes.get(digest):
            self._sizes[digest] = self._files.size(digest)
        return self._sizes[digest]


class Counted(StreamingResponse):
    """An event stream that was counted by `Limiter.open_stream`."""

    def __init__(self, limiter: Limiter, project: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limiter, self._project = limiter, project

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._limiter.close_stream(self._project)


def _reached(*about: Any) -> LimitReached:
    return LimitReached.of(errors.LimitReached(*about))
