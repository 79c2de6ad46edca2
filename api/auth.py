"""Authentication. Without a key the service answers to this machine only, and every caller is its administrator."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from fastapi import Request

from api.problems import Forbidden, Unauthorized
from base.defaults import is_loopback


@dataclass(frozen=True)
class Member:
    """The holder of a key: its role, and the project whose rows it can see."""

    project: str
    role: Literal["admin", "member", "reader"]


async def member(request: Request) -> Member:
    """Return the caller. Raises Unauthorized if a key is needed and is missing or wrong."""
    key_hash: str | None = request.app.state.settings.admin_key_hash
    if key_hash is None:
        _require_local(request)
        return Member("default", "admin")
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    sent_hash = hashlib.sha256(key.strip().encode()).hexdigest()
    if scheme.lower() != "bearer" or not hmac.compare_digest(sent_hash, key_hash):
        detail = "this key is not known" if key else "send the header `Authorization: Bearer <key>`"
        raise Unauthorized(detail, headers={"WWW-Authenticate": 'Bearer realm="distillery"'})
    return Member("default", "admin")


def _require_local(request: Request) -> None:
    """Refuse host names of other machines and pages of other origins, which could use the service through a browser."""
    host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    if not (is_loopback(host) or host.endswith(".localhost")):
        raise Forbidden(f"without a key the service answers to 127.0.0.1 or localhost only, not to {host!r}")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Forbidden(f"without a key no page of another origin may call the service; this one is {origin!r}")
