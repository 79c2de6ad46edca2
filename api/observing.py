"""What the operator sees of each request: a line in the access log, a figure by route, and the context of other lines.

The outermost middleware: it also sees what other middleware refuses.
"""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from base import figures
from base.logs import ACCESS, REQUEST
from base.text import shown

log = logging.getLogger(ACCESS)

UNKNOWN = "unknown"
"""The route of an address that the service does not have; one name for all of them."""
STREAM = b"text/event-stream"
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes that are asked every few seconds: an answer without a fault is no line in the access log."""


class Observing:
    """The middleware. With `access_log` it writes a line for each request that has ended."""

    def __init__(self, app: ASGIApp, access_log: bool) -> None:
        self._app, self._access_log = app, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        token, began = REQUEST.set(scope), time.perf_counter()
        status, streams = 0, False

        async def send_seen(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                streams = any(
                    name == b"content-type" and value.startswith(STREAM) for name, value in message["headers"]
                )
            await send(message)

        try:
            await self._app(scope, receive, send_seen)
        finally:
            seconds = time.perf_counter() - began
            REQUEST.reset(token)
            route = _route(scope)
            if streams:
                figures.streamed(route)
            else:
                # Without an answer the client has hung up, or the server is stopping.
                figures.answered(scope["method"], route, status or 499, seconds)
            if self._access_log and not (route in PROBES and status == 200):
                _write_line(scope, route, status, seconds)


def _route(scope: Scope) -> str:
    path: str | None = getattr(scope.get("route"), "path", None)
    return figures.template(path) if path else UNKNOWN


def _write_line(scope: Scope, route: str, status: int, seconds: float) -> None:
    """Write the line. Neither the query nor any header is in it: a client may have put its key there."""
    caller = scope.get("distillery.member")
    key = (getattr(caller, "key_id", None) or getattr(caller, "key_name", None)) if caller else None
    fields: dict[str, Any] = {
        "request_id": scope.get("request_id"),
        "method": scope["method"],
        "path": shown(scope["path"])[:500],
        "route": route,
        "status": status or None,
        "ms": round(1000 * seconds, 1),
        "client": (scope.get("client") or (None,))[0],
        "project": getattr(caller, "project", None),
        "key": key,
    }
    log.info(
        "%s %s %s %s ms key=%s %s",
        *(
            fields["method"],
            fields["path"],
            status or "no answer",
            fields["ms"],
            key or "-",
            fields["request_id"] or "",
        ),
        extra={"fields": fields},
    )
