"""A job's feed: what happened to it, numbered from 1 without gaps. Polling and streaming read the same rows."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from pydantic_core import to_json
from sqlalchemy import Connection
from starlette.responses import Response, StreamingResponse

from api.answers import page
from api.auth import Who
from api.database import Db
from api.problems import NotFound, responses
from api.schemas import EventView, Page, event_view
from base.errors import DatabaseUnavailable
from base.jobs import TERMINAL
from store import events, jobs
from store.database import Database
from store.errors import NotFound as Gone
from store.events import Event

router = APIRouter(prefix="/v1/jobs/{job_id}/events", tags=["jobs"])

LOOK_S = 0.3
PING_S = 15.0
BATCH = 500

After = Annotated[int, Query(ge=0, description="The number of the last event that you have.")]


@router.get("", response_model=Page[EventView], responses=responses(NotFound))
async def listing(
    job_id: str, who: Who, db: Db, after: After = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 200
) -> Response:
    """Events after a number, oldest first. `next` is the number to ask with for more, null where there is none yet."""
    found, _ = await db.read(_look, job_id, who.project, after, limit + 1)
    shown = found[:limit]
    return page([event_view(event) for event in shown], str(shown[-1].seq) if len(found) > limit else None)


@router.get(
    "/stream",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The job has ended and you have every event; do not come back."},
        **responses(NotFound),
    },
)
async def stream(
    job_id: str,
    who: Who,
    db: Db,
    after: After = 0,
    last_event_id: Annotated[int | None, Header(alias="Last-Event-ID", ge=0)] = None,
) -> Response:
    """The same events as they come, as server-sent events: `id` is the number, `event` the type, `data` the event.

    A browser that reconnects sends `Last-Event-ID` and misses nothing. The stream ends when the job has ended.
    """
    seen = last_event_id if last_event_id is not None else after
    first, ended = await db.read(_look, job_id, who.project, seen, BATCH)
    if ended and not first:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    feed = _feed(db, job_id, who.project, seen)
    return StreamingResponse(feed, media_type="text/event-stream", headers=headers)


async def _feed(db: Database, job_id: str, project: str, seen: int) -> AsyncIterator[bytes]:
    yield b"retry: 2000\n\n"
    spoke = time.monotonic()
    while True:
        try:
            found, ended = await db.read(_look, job_id, project, seen, BATCH)
        except (Gone, DatabaseUnavailable):
            # Whoever listens comes back, and is told then what became of the job or of the database.
            return
        for event in found:
            yield _message(event_view(event))
            seen, spoke = event.seq, time.monotonic()
        if not found:
            if ended:
                return
            if time.monotonic() - spoke > PING_S:
                yield b": still here\n\n"
                spoke = time.monotonic()
            await asyncio.sleep(LOOK_S)


def _message(event: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event["seq"], event["type"].encode(), to_json(event))


def _look(connection: Connection, job_id: str, project: str, seen: int, limit: int) -> tuple[list[Event], bool]:
    """Events after `seen`, and whether the job has ended. The status is read first: its end is then in the feed."""
    ended = jobs.get(connection, job_id, project=project).status in TERMINAL
    return events.list_events(connection, job_id, seen, limit), ended
