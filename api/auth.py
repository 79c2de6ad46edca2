"""Authentication: which project a request may see, and what it may do there.

Without any key the service answers to this machine only, and every caller is its operator. From the first key on, every
request needs one: the operator's, whose digest is a setting, or one that has a row in `keys`. What a process knows of a
key is at most `FRESH_S` old, so that a key that was made, rotated or revoked by any process is so everywhere by then.
"""

import asyncio
import hmac
import logging
import time
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import Scope

from api.problems import Forbidden, RoleForbidden, Unauthorized
from base import figures
from base.defaults import DEFAULT_PROJECT, is_loopback
from base.errors import DatabaseUnavailable, StorageFull
from base.wire import Role
from store import keys
from store.database import Database
from store.keys import Key
from store.settings import Settings

log = logging.getLogger("distillery.api")

FRESH_S = 4.0
"""The age at which what is known of a key is read again."""
KNOWN_KEYS = 10_000
"""The most keys that a process remembers."""
WRONG_KEY_S = 0.5
"""The time after which a wrong key is answered."""
WAITING = 100
"""The most requests that wait for such an answer at a time; others get it at once, so that they cost nothing."""
USED_EVERY_S = 60.0
"""The time between two writes of a key's last use."""

READS = frozenset({"GET", "HEAD", "OPTIONS"})
READS_BY_POST = frozenset({"/v1/jobs/validate"})
"""Addresses that change nothing, although they take a body."""


@dataclass(frozen=True)
class Member:
    """The caller of a request: the project whose rows it can see, its role there, and the key that it sent."""

    project: str
    role: Role
    key_id: str | None
    """None if no row has the key: the operator's, or none at all."""
    key_name: str

    def is_at_least(self, role: Role) -> bool:
        return _ROLES.index(self.role) <= _ROLES.index(role)


_ROLES: tuple[Role, ...] = ("operator", "admin", "member", "reader")

LOCAL = Member(DEFAULT_PROJECT, "operator", None, "local")
OPERATOR = Member(DEFAULT_PROJECT, "operator", None, "operator")


class Authentication:
    """Tells the caller of a request by its headers alone."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._operator_hash = database, settings.admin_key_hash
        self._known: dict[str, tuple[Key, float]] = {}
        self._any_key, self._any_key_at = False, float("-inf")
        self._waiting = 0
        self._writes: set[asyncio.Task[None]] = set()

    async def member(self, scope: Scope) -> Member:
        """Return the caller. Raises Unauthorized, Forbidden, or RoleForbidden for a reader who would change something;
        and LimitReached for more requests in a second than the project may send.

        It reads no body. Middleware may call it before the route does: the answer is kept in the scope.
        """
        known: Member | None = scope.get("distillery.member")
        if known is None:
            known = scope["distillery.member"] = await self._member(scope)
            await scope["app"].state.limiter.admit(known)
        return known

    async def check(self, scope: Scope) -> None:
        """Raise what `member` would raise now, for a stream that has been open for some time."""
        await self._member(scope)

    def forget(self) -> None:
        """Read all keys again: this process has changed one."""
        self._known.clear()
        self._any_key_at = float("-inf")

    async def _member(self, scope: Scope) -> Member:
        headers = Headers(scope=scope)
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        if self._operator_hash is None and not await self._needs_key():
            _require_local(headers)
            return LOCAL
        key = sent.strip()
        if not key:
            raise _unauthorized("send the header `Authorization: Bearer <key>`")
        caller = await self._holder(key) if scheme.lower() == "bearer" else None
        if caller is None:
            await self._delay(scope, key)
            raise _unauthorized("this key is not known, or is not valid any more")
        # Also the caller of what is refused: the audit log names it.
        scope["distillery.caller"] = caller
        method, path = scope["method"], scope["path"]
        if caller.role == "reader" and method not in READS and path not in READS_BY_POST:
            raise RoleForbidden("a key with the role reader may only read; this needs the role member", needs="member")
        return caller

    async def _holder(self, key: str) -> Member | None:
        digest = keys.digest_of(key)
        if self._operator_hash is not None and hmac.compare_digest(digest, self._operator_hash):
            return OPERATOR
        prefix = keys.prefix_of(key)
        row = None if prefix is None else await self._row(prefix)
        # Where no row is found, something is compared as well: the time tells nothing.
        if not hmac.compare_digest(digest, row.sha256 if row else "0" * 64) or row is None:
            return None
        return Member(row.project, row.role, row.id, row.name)

    async def _row(self, prefix: str) -> Key | None:
        row, read_at = self._known.get(prefix, (None, float("-inf")))
        now = time.monotonic()
        if now - read_at < FRESH_S:
            return row
        row = await self._database.read(keys.find, prefix)
        if row is None:
            self._known.pop(prefix, None)
            return None
        if len(self._known) >= KNOWN_KEYS:
            self._known.clear()
        self._known[prefix] = row, now
        if row.last_used_at is None or time.time() - row.last_used_at > USED_EVERY_S:
            task = asyncio.create_task(self._mark_used(row))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)
        return row

    async def _mark_used(self, row: Key) -> None:
        try:
            await self._database.write(keys.mark_used, row.id)
        except (DatabaseUnavailable, StorageFull) as error:
            log.warning("the last use of key %s was not written: %s", row.id, error)

    async def _needs_key(self) -> bool:
        """Return whether a key was ever made. Then this stays true for the process."""
        now = time.monotonic()
        if not self._any_key and now - self._any_key_at >= FRESH_S:
            self._any_key = await self._database.read(keys.any_exists)
            self._any_key_at = now
        return self._any_key

    async def _delay(self, scope: Scope, key: str) -> None:
        figures.refused("wrong_key")
        if self._waiting >= WAITING:
            return
        address = (scope.get("client") or ("unknown",))[0]
        # A prefix that has the right form tells whose key it may have been, and nothing of the secret.
        log.warning("wrong key %s from %s: %s", keys.prefix_of(key) or "of another form", address, scope["method"])
        self._waiting += 1
        try:
            await asyncio.sleep(WRONG_KEY_S)
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Wait for the writes that were begun."""
        if self._writes:
            await asyncio.wait(self._writes)


async def member(request: Request) -> Member:
    """Return the caller of a route."""
    authentication: Authentication = request.app.state.authentication
    return await authentication.member(request.scope)


async def admin(request: Request) -> Member:
    """Return the caller of a route for admins of the project and the operator. Raises RoleForbidden."""
    return _at_least("admin", await member(request))


async def operator(request: Request) -> Member:
    """Return the caller of a route for the operator. Raises RoleForbidden."""
    return _at_least("operator", await member(request))


def _at_least(role: Role, caller: Member) -> Member:
    if not caller.is_at_least(role):
        raise RoleForbidden(f"this needs a key with the role {role}; this key has {caller.role}", needs=role)
    return caller


def _split(url: str) -> SplitResult:
    """Return the parts of a header's URL; those of none if it is malformed, such as `[`."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _unauthorized(detail: str) -> Unauthorized:
    return Unauthorized(detail, headers={"WWW-Authenticate": 'Bearer realm="distillery"'})


def _require_local(headers: Headers) -> None:
    """Refuse host names of other machines and pages of other origins, which could use the service through a browser."""
    host = _split(f"//{headers.get('host', '')}").hostname or ""
    if not (is_loopback(host) or host.endswith(".localhost")):
        raise Forbidden(f"without a key the service answers to 127.0.0.1 or localhost only, not to {host!r}")
    origin = headers.get("origin")
    if origin is not None and _split(origin).netloc != headers.get("host"):
        raise Forbidden(f"without a key no page of another origin may call the service; this one is {origin!r}")
