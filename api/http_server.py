"""The HTTP protocol of the server: uvicorn's, with bounds on what a client can make it keep and wait for.

These bounds hold for every client of the port, before any key is looked at:

    unfinished header, trailer, chunk line    HEADER_BYTES, HEADERS, HEADER_S
    URL                                       HEADER_BYTES
    requests in advance on one connection     PIPELINED
    an unfinished body                        BODY_BYTES in SILENCE_S
    an answer that nobody reads               UNREAD_S
    connections                               `connection_bound`; at the bound the oldest without a request is closed

A request that breaks a bound is answered with a problem where an answer is still possible. The connection then stays
open for LINGER_S without being read into memory: closed at once, the kernel may drop the answer on its way.
"""

import asyncio
import logging
import resource
import secrets
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from api.problems import AddressTooLong, HeadersTooLarge, MalformedRequest, Problem, Unavailable
from base import figures

log = logging.getLogger("distillery.api")

HEADER_BYTES = 65_536
"""The largest header, URL included."""
HEADERS = 100
HEADER_S = 10.0
"""Time limit of a whole header, from the connection's begin or its last answer."""
PIPELINED = 16
"""Requests that a client may send before the first of them is answered."""
SILENCE_S, BODY_BYTES = 60.0, 10_000
"""Time in which at least so many bytes of an unfinished body arrive."""
UNREAD_S = 300.0
"""Time in which the client takes nothing of an answer."""
LINGER_S = 2.0
LINGER_BYTES = 4_000_000
"""What a connection still reads meanwhile, to drop it: more than this is no body that was begun in good faith."""
PIECE_BYTES = 16_384
CONNECTIONS = 4096
"""The most connections of a process, however many descriptors it may open."""
DESCRIPTORS_EACH = 3
"""Descriptors for each connection: its own, a file that is sent or received, and one left for everything else."""
TICK_S = 0.5
LOG_EVERY_S = 60.0


def connection_bound() -> int:
    """Return the number of connections that this process may hold: a third of the files that it may open, or fewer."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if soft == resource.RLIM_INFINITY else max(8, min(CONNECTIONS, soft // DESCRIPTORS_EACH))


class Crowd:
    """The connections of a server, by what they wait for. Each dict has the time since which, the oldest first."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.without_request: dict[Connection, float] = {}
        """No whole header yet, or no next one."""
        self.in_body: dict[Connection, float] = {}
        """Since when the body is waited for, or its last BODY_BYTES have been there."""
        self.unread: dict[Connection, float] = {}
        """The client does not take the answer."""
        self.leaving: dict[Connection, float] = {}
        """Answered for the last time, and not closed yet."""
        self._members = 0
        self._ticking = False
        self._logged_at = -LOG_EVERY_S

    def enter(self, connection: "Connection", now: float) -> bool:
        """Count a connection. Closes the oldest without a request if there are too many; returns False without one."""
        self._members += 1
        if not self._ticking:
            self._ticking = True
            connection.loop.call_later(TICK_S, self._tick, connection.loop)
        if len(connection.connections) <= self.bound:
            return True
        self._log_full(now)
        group = self.leaving or self.without_request
        if not group:
            return False
        oldest = next(iter(group))
        del group[oldest]
        oldest.transport.abort()
        return True

    def leave(self, connection: "Connection") -> None:
        self._members -= 1
        for group in (self.without_request, self.in_body, self.unread, self.leaving):
            group.pop(connection, None)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has waited for too long."""
        now = loop.time()
        for group, limit_s in ((self.without_request, HEADER_S), (self.leaving, LINGER_S), (self.unread, UNREAD_S)):
            for connection, since in list(group.items()):
                if now - since < limit_s:
                    break  # Later ones wait for less time.
                del group[connection]
                connection.transport.abort()
        for connection, since in list(self.in_body.items()):
            if connection.flow.read_paused:
                # The application is slow, not the client.
                self.in_body[connection] = now
            elif now - since > SILENCE_S:
                del self.in_body[connection]
                connection.transport.abort()
        self._ticking = self._members > 0
        if self._ticking:
            loop.call_later(TICK_S, self._tick, loop)

    def _log_full(self, now: float) -> None:
        if now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            log.warning("%d connections, the most that this process holds: those without a request go", self.bound)


_crowds: WeakKeyDictionary[ServerState, Crowd] = WeakKeyDictionary()


class Connection(HttpToolsProtocol):
    """One connection. It is also the transport of its request cycles, so that it is asked before it is closed."""

    write: Callable[[bytes], None]
    is_closing: Callable[[], bool]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        if server_state not in _crowds:
            _crowds[server_state] = Crowd(connection_bound())
        self.crowd = _crowds[server_state]
        self.url = b""
        self.unfinished = 0
        """Bytes since the last header, body or message was whole."""
        self._refusal: Problem | None = None
        self._leaving = False
        self._dropped = self._body_bytes = 0

    # ── the connection ──

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.write, self.is_closing = transport.write, transport.is_closing
        now = self.loop.time()
        if self.crowd.enter(self, now):
            self.crowd.without_request[self] = now
        else:
            self._refuse(Unavailable("the server has as many connections as it can hold; try again"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._leaving:
            self._dropped += len(data)
            if self._dropped > LINGER_BYTES:
                self.transport.pause_reading()
            return
        if len(data) <= PIECE_BYTES or (self.cycle is not None and self.cycle.more_body):
            self._parse(data)
            return
        # A read has up to 256 kB. As a header, these would become very many objects before they were counted.
        view = memoryview(data)
        for start in range(0, len(data), PIECE_BYTES):
            if not (self._leaving or self.transport.is_closing()):
                self._parse(view[start : start + PIECE_BYTES])

    def _parse(self, data: bytes | memoryview) -> None:
        self.unfinished += len(data)
        super().data_received(data)  # type: ignore[arg-type]
        if self.transport.is_closing() or self._leaving:
            return
        if self.unfinished > HEADER_BYTES or len(self.headers or ()) > HEADERS:
            self._refuse(self._too_large())
        elif self.cycle is not None and self.cycle.more_body and self not in self.crowd.in_body:
            self.crowd.in_body[self] = self.loop.time()

    def pause_writing(self) -> None:
        self.crowd.unread[self] = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.crowd.unread.pop(self, None)
        super().resume_writing()

    def close(self) -> None:
        """Close the connection; later, if the client may still be sending a body that nobody reads."""
        if self.cycle is not None and self.cycle.more_body:
            self._leave()
        else:
            self.transport.close()

    # ── the parser's callbacks ──

    def on_headers_complete(self) -> None:
        # `unfinished` may count a part of the body.
        if self.unfinished > HEADER_BYTES or len(self.headers) > HEADERS:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > HEADER_BYTES or len(self.headers) > HEADERS:
                self._stop_parsing(self._too_large())
        if len(self.pipeline) >= PIPELINED:
            self._stop_parsing(MalformedRequest(f"more than {PIPELINED} requests before the first was answered"))
        self.unfinished = 0
        self.crowd.without_request.pop(self, None)
        super().on_headers_complete()
        self.cycle.transport = self  # type: ignore[assignment]
        # Trailers follow here. They are no headers of this request: it may be answered already.
        self.headers = []

    def on_body(self, body: bytes) -> None:
        self.unfinished = 0
        self._body_bytes += len(body)
        if self._body_bytes >= BODY_BYTES:
            self._body_bytes = 0
            if self in self.crowd.in_body:
                self.crowd.in_body[self] = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.unfinished = 0
        self.crowd.in_body.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.cycle.more_body and not self.pipeline:
            self._leave()
        if self._leaving:
            return
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self.crowd.without_request[self] = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or MalformedRequest("this is not a valid HTTP/1.1 request"))

    def _unsupported_upgrade_warning(self) -> None:
        """Answer as if no other protocol had been asked for. Whatever follows is not parsed any more."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    # ── refusals ──

    def _too_large(self) -> Problem:
        if len(self.url) > HEADER_BYTES // 2:
            return AddressTooLong(f"a URL and the headers have at most {HEADER_BYTES} bytes together")
        return HeadersTooLarge(f"a request has at most {HEADERS} headers, of {HEADER_BYTES} bytes together")

    def _stop_parsing(self, refusal: Problem) -> None:
        """End the parser: its caller then asks for an answer to a malformed request."""
        self._refusal = refusal
        raise ValueError(refusal.detail)

    def _refuse(self, problem: Problem) -> None:
        """Answer with a problem outside of the application, and read nothing more."""
        figures.refused(problem.code)
        if self.pipeline:
            # An answer is under way, and others would have to come before this one.
            self.pipeline.clear()
            self.transport.abort()
            return
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # The application's own answer must not follow.
            started, cycle.disconnected = cycle.response_started, True
            cycle.message_event.set()
            if started:
                self.transport.abort()
                return
        response = problem.response(f"req_{secrets.token_hex(8)}")
        lines = [STATUS_LINE[response.status_code]]
        lines += [name + b": " + value + b"\r\n" for name, value in response.raw_headers]
        self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", response.body]))
        self._leave()

    def _leave(self) -> None:
        """End our side of the connection. Until the client ends its own, or LINGER_S is over, its bytes are dropped."""
        if self._leaving or self.transport.is_closing():
            return
        self._leaving = True
        for group in (self.crowd.without_request, self.crowd.in_body):
            group.pop(self, None)
        self.crowd.leaving[self] = self.loop.time()
        self._unset_keepalive_if_required()
        if self.cycle is not None:
            self.cycle.body.clear()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
