"""What a job's process printed, one log an attempt: its end, or the bytes from an offset on, to follow it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.responses import Response

from api.auth import Who
from api.database import Db, Files
from api.problems import NotFound, responses
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
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **responses(NotFound)},
)
async def logs(
    *,
    job_id: str,
    who: Who,
    db: Db,
    files: Files,
    tail: Annotated[int, Query(ge=1, le=100_000, description="Lines from the end.")] = 1000,
    offset: Annotated[int | None, Query(ge=0, description="Bytes from here on, instead of the tail.")] = None,
    attempt: Annotated[
        int | None, Query(ge=1, description="Which claim of the job; the newest with a log, if left out.")
    ] = None,
) -> Response:
    """The log as text, 1 MiB at most. `X-Log-Next-Offset` is where to go on with `offset`, and `attempt` beside it."""
    job = await db.read(jobs.get, job_id, project=who.project)
    wanted = [attempt] if attempt is not None else range(job.fence, 0, -1)
    number, part = await to_thread.run_sync(_newest, [(n, files.log_path(job_id, n)) for n in wanted], tail, offset)
    headers = {
        "X-Log-Attempt": str(number),
        "X-Log-Newest-Attempt": str(job.fence),
        "X-Log-Offset": str(part.begin),
        "X-Log-Next-Offset": str(part.end),
        "Cache-Control": "no-store",
    }
    return Response(part.text, media_type="text/plain; charset=utf-8", headers=headers)


def _newest(places: list[tuple[int, Path]], tail: int, offset: int | None) -> tuple[int, Part]:
    for number, path in places:
        if path.exists():
            return number, _from(path, offset) if offset is not None else _end(path, tail)
    return (places[0][0] if places else 0), Part(b"", 0, 0)


def _from(path: Path, offset: int) -> Part:
    with path.open("rb") as log:
        log.seek(offset)
        text = log.read(CHUNK_BYTES)
    return Part(text, offset, offset + len(text))


def _end(path: Path, lines: int) -> Part:
    """The last lines within the last chunk; a file that still grows is read no further than its size now."""
    with path.open("rb") as log:
        size = log.seek(0, os.SEEK_END)
        begin = max(0, size - CHUNK_BYTES)
        log.seek(begin)
        text = log.read(size - begin)
    kept = b"".join(text.splitlines(keepends=True)[-lines:])
    return Part(kept, size - len(kept), size)
