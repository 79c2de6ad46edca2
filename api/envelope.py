"""What every request and answer has: an id, headers that keep a browser from harm, and a bound on the body."""

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import ServerError, TooLarge

log = logging.getLogger("distillery.api")

JSON_BODY_BYTES = 1_000_000
"""A job spec of a thousand lines is far below; uploads have a limit of their own."""

_A_SANE_ID = re.compile(r"[\w.:-]{1,80}")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Envelope:
    """ASGI middleware, not BaseHTTPMiddleware: streams pass through untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _A_SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(8)}"
        scope["request_id"] = request_id

        started = False

        async def send_in_envelope(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        bounded = receive if scope["path"].startswith("/v1/uploads") else _bounded(receive)
        try:
            await self.app(scope, bounded, send_in_envelope)
        except Exception:
            # The last place that can still answer in the one form; what happened is for the log alone.
            log.exception("%s %s %s ended in an unforeseen error", request_id, scope["method"], scope["path"])
            if started:
                raise
            told = ServerError("an unforeseen error; the server's log has it under this request_id")
            await told.response(request_id)(scope, receive, send_in_envelope)


def _bounded(receive: Receive) -> Receive:
    seen = 0

    async def receive_within_bounds() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > JSON_BODY_BYTES:
            raise TooLarge(f"a body here has at most {JSON_BODY_BYTES} bytes; files go to /v1/uploads")
        return message

    return receive_within_bounds
