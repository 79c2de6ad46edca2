"""What a client can make a connection keep and wait for is bounded. A small application answers behind the protocol."""

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from api import http_server
from api.http_server import (
    BODY_BYTES,
    CONNECTIONS,
    HEADER_BYTES,
    HEADER_S,
    HEADERS,
    PIPELINED,
    SILENCE_S,
    UNREAD_S,
    Connection,
    Crowd,
    connection_bound,
)
from api.middleware import BODIES_BYTES, JSON_BODY_BYTES, JSON_BODY_S
from kdcore.spec.reading import MAX_FAULTS
from worker.slot import DESCRIPTORS

pytestmark = pytest.mark.anyio

GET = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CLOSE = b"Connection: close\r\n\r\n"
Answer = tuple[int, dict[str, str], bytes]


class Application:
    """Answers with the number of bytes of the body and the names of the headers. `/unread` does not read the body,
    `/never` waits for the client to leave, `/large` sends more than any buffer holds."""

    def __init__(self) -> None:
        self.disconnected = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, more = 0, scope["path"] not in ("/unread", "/large")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected.set()
                return
            size += len(message["body"])
            more = message["more_body"] or scope["path"] == "/never"
        headers = [name.decode() for name, _ in scope["headers"]]
        body = (
            b" " * (64 << 20) if scope["path"] == "/large" else json.dumps({"size": size, "headers": headers}).encode()
        )
        length = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})
        if scope["path"] == "/large":
            await receive()
            self.disconnected.set()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)

    async def answer(self) -> Answer:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:-2])}
        body = await self.reader.readexactly(int(headers["content-length"]))
        return int(lines[0].split()[1]), headers, body

    async def refusal(self) -> tuple[int, str]:
        """Status and code of a problem, after which the connection ends."""
        status, headers, body = await self.answer()
        assert headers["content-type"] == "application/problem+json" and headers["connection"] == "close"
        assert await self.ended()
        return status, json.loads(body)["code"]

    async def ended(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


class Served:
    def __init__(self, connect: Callable[[], Any], application: Application, crowd: Crowd) -> None:
        self._connect, self.application, self.crowd = connect, application, crowd
        self.clients: list[Client] = []

    async def client(self, *parts: bytes) -> Client:
        client = Client(*await self._connect())
        self.clients.append(client)
        client.send(*parts)
        return client


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what the loop does itself has no event
        await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(bound: int = 100) -> AsyncIterator[Served]:
    application, state, loop = Application(), ServerState(), asyncio.get_running_loop()
    config = uvicorn.Config(application, http=Connection, ws="none", log_config=None, lifespan="off")
    http_server._crowds[state] = Crowd(bound)
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    served = Served(lambda: asyncio.open_connection(host, port), application, http_server._crowds[state])
    try:
        yield served
    finally:
        for client in served.clients:
            client.writer.close()
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await until(lambda: not state.connections)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADER_S", "SILENCE_S", "UNREAD_S", "LINGER_S"):
        monkeypatch.setattr(http_server, name, 0.05)
    monkeypatch.setattr(http_server, "TICK_S", 0.01)


async def test_connection_accepts_a_header_below_the_bound(served: Served) -> None:
    client = await served.client(GET, b"X: " + b"a" * (HEADER_BYTES - 500), b"\r\n", CLOSE)
    assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    ("parts", "refusal"),
    [
        ([GET + b"X: " + b"a" * HEADER_BYTES + b"\r\n\r\n"], (431, "headers_too_large")),
        ([GET + b"X: ", *[b"a" * 100_000] * 20], (431, "headers_too_large")),
        ([GET, *[b"X-a: b\r\n" * 10_000] * 20], (431, "headers_too_large")),
        ([GET + b"X: a\r\n" * 101 + b"\r\n"], (431, "headers_too_large")),
        ([b"GET /" + b"a" * HEADER_BYTES + b" HTTP/1.1\r\n\r\n"], (414, "address_too_long")),
        ([b"GET /", *[b"a" * 100_000] * 20], (414, "address_too_long")),
        ([b"\r\n" * 100_000], (431, "headers_too_large")),
        ([b"\x16\x03\x01\x02\x00\x01"], (400, "malformed_request")),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\n2;", *[b"x" * 100_000] * 20], (431, "headers_too_large")),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-a: b\r\n" * 200], (431, "headers_too_large")),
    ],
    ids=["one read", "one long", "many lines", "many", "url", "long url", "empty lines", "tls", "chunk", "trailers"],
)
async def test_connection_refuses_what_is_too_large_before_it_is_whole(
    served: Served, parts: list[bytes], refusal: tuple[int, str]
) -> None:
    assert await (await served.client(*parts)).refusal() == refusal


async def test_connection_does_not_count_the_body_as_header(served: Served) -> None:
    size = 4 * HEADER_BYTES
    client = await served.client(POST + b"Content-Length: %d\r\n" % size + CLOSE + b"x" * size)
    assert json.loads((await client.answer())[2])["size"] == size


async def test_connection_does_not_take_trailers_for_headers(served: Served) -> None:
    chunked = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
    client = await served.client(POST + chunked)
    assert "authorization" not in json.loads((await client.answer())[2])["headers"]
    client.send(GET + CLOSE)
    assert (await client.answer())[0] == 200, "the connection can be used again"


@pytest.mark.parametrize("sent", [b"", GET, GET + CLOSE.replace(b"close\r\n", b"keep-alive\r\n") + GET])
async def test_connection_without_a_whole_header_is_closed(served: Served, impatient: None, sent: bytes) -> None:
    client = await served.client(sent)
    if sent.count(GET) == 2:
        assert (await client.answer())[0] == 200
    assert await client.ended()


async def test_connection_that_sends_no_more_of_a_body_is_closed(served: Served, impatient: None) -> None:
    client = await served.client(POST + b"Content-Length: 9\r\n\r\nx")
    assert await client.ended()
    await served.application.disconnected.wait()


async def test_connection_that_drips_a_body_is_closed(served: Served, impatient: None) -> None:
    client = await served.client(POST + b"Content-Length: 9000000\r\n\r\n")
    while not served.application.disconnected.is_set():
        client.send(b"x")
        await asyncio.sleep(0.005)
    assert await client.ended()


async def test_connection_whose_answer_nobody_reads_is_closed(served: Served, impatient: None) -> None:
    client = await served.client(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await served.application.disconnected.wait()


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_connection_ends_after_an_answer_that_left_a_body_unread(served: Served, close: bytes) -> None:
    """What the client sends meanwhile must not take the answer from it."""
    client = await served.client(b"POST /unread HTTP/1.1\r\nHost: a\r\n" + close + b"Content-Length: 9000000\r\n\r\n")
    client.send(*[b"x" * 100_000] * 20)
    assert (await client.answer())[0] == 200
    assert await client.ended()


async def test_connection_that_stays_after_its_end_is_closed(served: Served, impatient: None) -> None:
    await served.client(b"no HTTP\r\n\r\n")
    await until(lambda: len(served.crowd.leaving) == 1)
    await until(lambda: not served.crowd.leaving)


async def test_connection_accepts_few_requests_in_advance(served: Served) -> None:
    one = GET + b"\r\n"
    few = await served.client(one * PIPELINED)
    assert [(await few.answer())[0] for _ in range(PIPELINED)] == [200] * PIPELINED
    many = await served.client(one * 1000)
    assert await many.ended()


async def test_connection_ignores_a_request_for_another_protocol(served: Served) -> None:
    client = await served.client(GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert (await client.answer())[0] == 200
    assert await client.ended()


async def test_crowd_closes_the_oldest_connection_without_a_request_first() -> None:
    async with serving(bound=3) as served:
        await served.client(b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n")
        oldest, newer = await served.client(GET), await served.client()
        await until(lambda: len(served.crowd.without_request) == 2)
        latest = await served.client(GET + b"\r\n")
        assert (await latest.answer())[0] == 200
        assert await oldest.ended()
        newer.send(GET + b"\r\n")
        assert (await newer.answer())[0] == 200


async def test_crowd_refuses_a_connection_if_all_have_requests() -> None:
    async with serving(bound=2) as served:
        for _ in range(2):
            await served.client(b"GET /never HTTP/1.1\r\nHost: a\r\n\r\n")
        client = await served.client()
        status, headers, body = await client.answer()
        assert (status, json.loads(body)["code"], headers["retry-after"]) == (503, "unavailable", "2")
        assert await client.ended()


def test_connection_bound_is_well_below_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, bound in ((256, 85), (1024, 341), (1 << 20, CONNECTIONS), (resource.RLIM_INFINITY, CONNECTIONS), (9, 8)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert connection_bound() == bound


def test_defended_has_the_bounds_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "defended.md").read_text()
    for said in (
        f"{HEADER_BYTES:,} bytes, {HEADERS} headers",
        f"last answer | {HEADER_S:g} s |",
        f"on one connection | {PIPELINED} |",
        f"at most {CONNECTIONS:,} |",
        f"takes nothing | {UNREAD_S / 60:g} minutes |",
        f"upload's body | {BODY_BYTES:,} bytes in {SILENCE_S:g} s |",
        f"{JSON_BODY_BYTES // 10**6} MB, whole within {JSON_BODY_S:g} s",
        f"is receiving | {BODIES_BYTES // 10**6} MB |",
        f"first {MAX_FAULTS} faults",
        f"fewer than {DESCRIPTORS} more files",
    ):
        assert said in page, said
