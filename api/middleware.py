"""The middleware of every request. Before a route sees it, in this order: the header, the key, the body.

It also gives the request an id, adds security headers, and answers bugs.
"""

import asyncio
import json
import logging
import math
import re
import secrets
from collections import Counter
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import (
    MalformedRequest,
    RequestTimeout,
    ServerError,
    TooLarge,
    Unavailable,
    UnsupportedEncoding,
    malformed_json,
    problem_of,
)
from base.text import clipped, shown

log = logging.getLogger("distillery.api")

JSON_BODY_BYTES = 1_000_000
"""The largest JSON body. Job specs are much smaller; uploads have a limit of their own."""
JSON_BODY_S = 30.0
"""Time limit of a whole JSON body."""
BODIES_BYTES = 64 * JSON_BODY_BYTES
"""The bodies that a process holds at a time, of all requests."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,80}", re.ASCII)
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
"""Methods whose bodies are read. Those of others are not: the connection ends after the answer."""

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]


class Middleware:
    """The middleware. It is plain ASGI, not BaseHTTPMiddleware, so that streams pass through unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._held = 0
        """Bytes of bodies that are being received."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        header = dict(scope["headers"])
        sent_id = header.get(b"x-request-id", b"").decode("latin-1")
        request_id = sent_id if _REQUEST_ID.fullmatch(sent_id) else f"req_{secrets.token_hex(8)}"
        scope["request_id"] = request_id

        started = False
        unread = has_body = header.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in header
        socket = receive

        async def receive_counted() -> Message:
            nonlocal unread
            message = await socket()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        receive = receive_counted

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                present = list(message.get("headers", ()))
                if unread and all(name.lower() != b"connection" for name, _ in present):
                    # The rest of the body is not read: without this, the client would send its next request here.
                    present.append((b"connection", b"close"))
                names = {name.lower() for name, _ in present}
                own = [(name, value) for name, value in _HEADERS if name not in names]
                message["headers"] = [*present, (b"x-request-id", request_id.encode()), *own]
            await send(message)

        try:
            _check_header(scope, header)
            path = scope["path"]
            if path.startswith("/v1/") or path == "/metrics":
                await scope["app"].state.authentication.member(scope)
            if has_body and scope["method"] in _WITH_BODY and not _is_streamed(path):
                receive = await self._received(receive, header)
        except ClientDisconnect:
            return
        except Exception as error:
            await _refuse(error, scope, receive, send_with_headers)
            return
        try:
            if scope["method"] == "HEAD":
                await _answer_head(self.app, scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)
        except Exception as error:
            if started:
                log.exception(
                    "%s %s %s ended in an unexpected error", request_id, scope["method"], shown(scope["path"])
                )
                raise
            await _refuse(error, scope, receive, send_with_headers)

    async def _received(self, receive: Receive, header: dict[bytes, bytes]) -> Receive:
        """Receive and check the whole body. Returns what gives it to the route."""
        length = header.get(b"content-length", b"")
        if length.isdigit() and int(length) > JSON_BODY_BYTES:
            raise _too_large()
        parts: list[bytes] = []
        held = 0
        try:
            async with asyncio.timeout(JSON_BODY_S):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    part = message.get("body", b"")
                    more = message.get("more_body", False)
                    parts.append(part)
                    held += len(part)
                    self._held += len(part)
                    if held > JSON_BODY_BYTES:
                        raise _too_large()
                    if more and self._held > BODIES_BYTES:
                        raise Unavailable("the server is receiving as much as it can hold; try again")
        except TimeoutError:
            raise RequestTimeout(f"the body was not whole after {JSON_BODY_S:g} s") from None
        finally:
            self._held -= held
        body = b"".join(parts)
        if body:
            _check_json(body, header.get(b"content-type", b"").decode("latin-1"))
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_whole() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message or await receive()

        return receive_whole


class _HeadAnswered(Exception):
    """The header is sent: the route need not make the body."""


async def _answer_head(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer HEAD with the header that GET would have. So every address that answers GET answers HEAD, too."""

    async def send_header(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.start":
            await send({"type": "http.response.body"})
            raise _HeadAnswered

    try:
        await app({**scope, "method": "GET"}, receive, send_header)
    except* _HeadAnswered:
        pass


async def _refuse(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the problem of an exception."""
    request_id = scope["request_id"]
    problem = problem_of(error)
    if problem is None:
        # Details go to the log only: they could show a caller how the service is built.
        what = (request_id, scope["method"], shown(scope["path"]))
        log.error("%s %s %s ended in an unexpected error", *what, exc_info=error)
        problem = ServerError("an unexpected error; the server's log has it under this request_id")
    response = problem.response(request_id)
    await response(scope, receive, send)


def _is_streamed(path: str) -> bool:
    """Return True for the addresses whose routes read the body themselves, piece by piece and bounded."""
    return path.startswith("/v1/uploads") or (path.startswith("/v1/jobs/") and path.endswith("/predict"))


def _check_header(scope: Scope, header: dict[bytes, bytes]) -> None:
    if len(header) < len(scope["headers"]) and sum(name == b"host" for name, _ in scope["headers"]) > 1:
        raise MalformedRequest("a request has one Host header")
    if b"content-encoding" not in header:
        return
    for encoding in (
        value.decode("latin-1").strip() for name, value in scope["headers"] if name == b"content-encoding"
    ):
        if encoding.lower() not in ("", "identity"):
            text = f"Content-Encoding {clipped(encoding)!r} is not supported: send the bytes as they are"
            raise UnsupportedEncoding(text)


def _too_large() -> TooLarge:
    return TooLarge(f"a body here has at most {JSON_BODY_BYTES} bytes; files go to /v1/uploads")


def _check_json(body: bytes, content_type: str) -> None:
    """Refuse JSON that has a key twice, where readers differ in which value counts, or that is not strict JSON.

    Other bodies are left to their routes, unless they are said to be JSON.
    """
    try:
        json.loads(body.decode(), object_pairs_hook=_each_once, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise malformed_json("the values are nested too deeply") from None
    except ValueError as error:
        if isinstance(error, _TwiceError) or "json" in content_type.lower():
            raise malformed_json(str(error)) from None


class _TwiceError(ValueError):
    pass


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _TwiceError(f"the key {clipped(twice)!r} is there twice in one object")
    return made


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{clipped(digits)} is no finite number")
    return number
