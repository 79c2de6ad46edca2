"""The output of a job's process, one log per attempt: its last lines, or the bytes from an offset, to follow it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.responses import Response

from api.dependencies import Caller, Db, Files
from api.openapi import headers
from api.problems import NotFound, responses
from api.schemas import Count, Id
from store import jobs

router = APIRouter(prefix="/v1/jobs/{job_id}/logs", tags=["jobs"])

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    text: bytes
    begin: int
    end: int


@router.get(
    "",
    response_class=Response,
    responses={
        200: {
            "content": {"text/plain": {"schema": {"type": "string"}}},
            **headers("X-Log-Attempt", "X-Log-Newest-Attempt", "X-Log-Offset", "X-Log-Next-Offset", "Cache-Control"),
        },
        **responses(NotFound),
    },
)
async def logs(
    *,
    job_id: Id,
    caller: Caller,
    db: Db,
    files: Files,
    tail: Annotated[int, Query(ge=1, le=100_000, description="Lines from the end.")] = 1000,
    offset: Annotated[Count | None, Query(description="Bytes from this offset, instead of the tail.")] = None,
    attempt: Annotated[
        Count | None, Query(ge=1, description="As in `/attempts`; default: the newest attempt that has a log.")
    ] = None,
) -> Response:
    """The log as text, 1 MiB at most. To follow it, send `X-Log-Next-Offset` as `offset` and `X-Log-Attempt` as
    `attempt`."""
    job = await db.read(jobs.get, job_id, project=caller.project)
    attempts = [attempt] if attempt is not None else range(job.fence, 0, -1)
    paths = [(number, files.log_path(job_id, number)) for number in attempts]
    number, part = await to_thread.run_sync(_newest, paths, tail, offset)
    headers = {
        "X-Log-Attempt": str(number),
        "X-Log-Newest-Attempt": str(job.fence),
        "X-Log-Offset": str(part.begin),
        "X-Log-Next-Offset": str(part.end),
        "Cache-Control": "no-store",
    }
    return Response(part.text, media_type="text/plain; charset=utf-8", headers=headers)


def _newest(paths: list[tuple[int, Path]], tail: int, offset: int | None) -> tuple[int, Part]:
    for number, path in paths:
        if path.exists():
            return number, _from(path, offset) if offset is not None else _end(path, tail)
    return (paths[0][0] if paths else 0), Part(b"", 0, 0)


def _from(path: Path, offset: int) -> Part:
    with path.open("rb") as log:
        # No seek beyond the end: file systems refuse large offsets.
        log.seek(min(offset, os.fstat(log.fileno()).st_size))
        text = log.read(CHUNK_BYTES) if log.tell() == offset else b""
    return Part(text, offset, offset + len(text))


def _end(path: Path, lines: int) -> Part:
    """Return the last lines within the last chunk. A growing file is read up to its present size."""
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        begin = max(0, size - CHUNK_BYTES)
        log.seek(begin)
        text = log.read(size - begin)
    tail = b"".join(text.splitlines(keepends=True)[-lines:])
    return Part(tail, size - len(tail), size)
