"""Bytes from a client to a file: in bounded memory, never more than agreed, and what has arrived stays."""

import errno
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from anyio import to_thread
from starlette.requests import ClientDisconnect, Request

from api.problems import OffsetConflict, TooLarge
from kdcore.errors import StorageFull

BUFFER_BYTES = 1 << 20


async def receive(request: Request, path: Path, offset: int, limit: int) -> int:
    """Write the request's body at `offset`; returns where it ends now, be the body cut short or not.

    Raises TooLarge when the file would grow beyond `limit` bytes, OffsetConflict while another request writes it.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and offset + int(announced) > limit:
        raise _too_large(limit)
    file = await to_thread.run_sync(_open, path, offset)
    try:
        async for piece in _pieces(request):
            if offset + len(piece) > limit:
                raise _too_large(limit)
            await to_thread.run_sync(_write, file, piece)
            offset += len(piece)
    except ClientDisconnect:
        # What arrived is kept: a resumable upload goes on from here.
        pass
    finally:
        await to_thread.run_sync(_close, file)
    return offset


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


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"at most {limit} bytes are taken here", limit_bytes=limit)


def _open(path: Path, offset: int) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _told_when_full():
        file = path.open("r+b" if path.exists() else "w+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise OffsetConflict("another request is writing this upload") from None
    # Bytes beyond the offset were never acknowledged: a crash may have left them half written.
    file.truncate(offset)
    file.seek(offset)
    return file


def _write(file: IO[bytes], piece: bytes) -> None:
    rest = memoryview(piece)
    with _told_when_full():
        while rest:
            rest = rest[file.write(rest) :]


def _close(file: IO[bytes]) -> None:
    with _told_when_full():
        os.fsync(file.fileno())
        file.close()


@contextmanager
def _told_when_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise StorageFull(f"no room for the upload: {error.strerror}", "delete jobs or models") from error
        raise
