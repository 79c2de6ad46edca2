"""The middleware of every request: its id, security headers, a limit on JSON bodies, and the answer to a bug."""

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import ServerError, TooLarge

log = logging.getLogger("distillery.api")

JSON_BODY_BYTES = 1_000_000
"""The largest JSON body. Job specs are much smaller; uploads have a limit of their own."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,80}")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class Middleware:
    """The middleware. It is plain ASGI, not BaseHTTPMiddleware, so that streams pass through unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else f"req_{secrets.token_hex(8)}"
        scope["request_id"] = request_id

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        limited = receive if scope["path"].startswith("/v1/uploads") else _limited(receive)
        try:
            await self.app(scope, limited, send_with_headers)
        except Exception:
            # Details go to the log only: they could show a caller how the service is built.
            log.exception("%s %s %s ended in an unexpected error", request_id, scope["method"], scope["path"])
            if started:
                raise
            problem = ServerError("an unexpected error; the server's log has it under this request_id")
            await problem.response(request_id)(scope, receive, send_with_headers)


def _limited(receive: Receive) -> Receive:
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > JSON_BODY_BYTES:
            raise TooLarge(f"a body here has at most {JSON_BODY_BYTES} bytes; files go to /v1/uploads")
        return message

    return receive_limited
