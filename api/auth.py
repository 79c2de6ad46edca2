"""Who asks. Without a key the service listens on this machine alone, and whoever is on it is its admin."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from fastapi import Depends, Request

from api.problems import Forbidden, Unauthorized
from store.settings import is_loopback


@dataclass(frozen=True)
class Member:
    """Whoever holds a key: what it may do, and the project that fences what it can see."""

    project: str
    role: Literal["admin", "member", "reader"]


async def member(request: Request) -> Member:
    """The asker, or a 401 that says how to become one."""
    key_hash: str | None = request.app.state.settings.admin_key_hash
    if key_hash is None:
        _only_from_here(request)
        return Member("default", "admin")
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given_hash = hashlib.sha256(key.strip().encode()).hexdigest()
    if scheme.lower() != "bearer" or not hmac.compare_digest(given_hash, key_hash):
        what = "this key is not known" if key else "send the header `Authorization: Bearer <key>`"
        raise Unauthorized(what, headers={"WWW-Authenticate": 'Bearer realm="distillery"'})
    return Member("default", "admin")


def _only_from_here(request: Request) -> None:
    """Without a key, a web page on another origin must not drive the service through the browser of its owner."""
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    if not (is_loopback(host) or host.endswith(".localhost")):
        raise Forbidden(f"without a key the service answers to 127.0.0.1 or localhost only, not to {host!r}")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Forbidden(f"without a key no page of another origin may call the service; this one is {origin!r}")


Who = Annotated[Member, Depends(member)]
