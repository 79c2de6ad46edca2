"""Bytes from a client to a file: in bounded memory, never more than agreed, and what has arrived can be kept."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import BinaryIO

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request

from api.problems import TooLarge

BUFFER_BYTES = 1 << 20
SILENCE_S = 60.0
"""So long a body may stand still: who vanished without a word would hold the upload's file for ever."""


@dataclass(frozen=True)
class Received:
    length: int
    whole: bool
    """False where the client went away in the middle, or fell silent."""


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
    chunks = request.stream()
    try:
        while (chunk := await _next(chunks)) is not None:
            waiting += chunk
            if len(waiting) >= BUFFER_BYTES:
                yield bytes(waiting)
                waiting.clear()
    except ClientDisconnect:
        yield bytes(waiting)
        raise
    yield bytes(waiting)


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    """The next chunk, or None at the end; silence is a disconnect."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await anext(chunks, None)
    except TimeoutError:
        raise ClientDisconnect from None


def too_large(at_most: int) -> TooLarge:
    return TooLarge(f"at most {at_most} bytes are taken here", limit_bytes=at_most)
