"""Bytes from a client to a file: in bounded memory, never more than agreed, and what has arrived can be kept."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import BinaryIO

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request

from api.problems import TooLarge

BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Received:
    length: int
    whole: bool
    """False where the client went away in the middle."""


async def receive(request: Request, file: BinaryIO, at_most: int) -> Received:
    """Write the request's body where the file stands. Raises TooLarge when there is more than agreed."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > at_most:
        raise too_large(at_most)
    length = 0
    try:
        async for piece in _pieces(request):
            if length + len(piece) > at_most:
                raise too_large(at_most)
            await to_thread.run_sync(file.write, piece)
            length += len(piece)
    except ClientDisconnect:
        return Received(length, whole=False)
    return Received(length, whole=True)


async def _pieces(request: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about a mebibyte; what came before a disconnect is handed on first."""
    waiting = bytearray()
    try:
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= BUFFER_BYTES:
                yield bytes(waiting)
                waiting.clear()
    except ClientDisconnect:
        yield bytes(waiting)
        raise
    yield bytes(waiting)


def too_large(at_most: int) -> TooLarge:
    return TooLarge(f"at most {at_most} bytes are taken here", limit_bytes=at_most)
