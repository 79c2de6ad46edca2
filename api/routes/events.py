"""A job's events, numbered from 1 without gaps. Polling and streaming read the same rows."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy import Connection
from starlette.responses import Response, StreamingResponse

from api.dependencies import Auth, Caller, Db, FeedDep, LimiterDep
from api.feed import Feed, message_of
from api.limits import Counted
from api.openapi import headers
from api.problems import NotFound, Problem, responses
from api.schemas import Count, Id, Page, page, view_of
from base.errors import DatabaseUnavailable
from base.jobs import TERMINAL
from base.wire import EventView
from store import errors, events, jobs
from store.database import Database
from store.events import Event

router = APIRouter(prefix="/v1/jobs/{job_id}/events", tags=["jobs"])

MESSAGE: dict[str, Any] = {
    "type": "object",
    "description": "One message of the stream, by the names of its fields.",
    "properties": {
        "id": {"type": "string", "description": "The number of the event."},
        "event": {"type": "string", "description": "The type of the event."},
        "data": {
            "type": "string",
            "description": "The event, as `/events` has it.",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/EventView"},
        },
    },
}

CHECK_S = 2.0
"""The longest time after which a stream looks again whether its key is valid, and its job is there."""
PING_S = 15.0
BATCH = 500

After = Annotated[Count, Query(description="The number of the last event that you have.")]


@router.get("", response_model=Page[EventView], responses=responses(NotFound))
async def listing(
    job_id: Id, caller: Caller, db: Db, after: After = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 200
) -> Response:
    """Events after a number, oldest first. Send `next` as `after` for more; it is null if there are no more yet."""
    rows, _ = await db.read(_read, job_id, caller.project, after, limit + 1)
    following = str(rows[limit - 1].seq) if len(rows) > limit else None
    return page([view_of(EventView, event) for event in rows[:limit]], following)


@router.get(
    "/stream",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": MESSAGE}}, **headers("Cache-Control")},
        204: {"description": "The job has ended and you have every event; do not reconnect."},
        **responses(NotFound),
    },
)
async def stream(
    job_id: Id,
    request: Request,
    caller: Caller,
    db: Db,
    auth: Auth,
    feed: FeedDep,
    limiter: LimiterDep,
    after: After = 0,
    last_event_id: Annotated[Count | None, Header(alias="Last-Event-ID")] = None,
) -> Response:
    """The same events as they happen, as server-sent events: `id` is the number, `event` the type, `data` the event.

    A browser that reconnects sends `Last-Event-ID` and misses nothing. The stream ends when the job has ended.
    """
    last = last_event_id if last_event_id is not None else after
    rows, ended = await db.read(_read, job_id, caller.project, last, BATCH)
    if ended and not rows:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    messages = _messages(db, job_id, caller.project, last, partial(auth.check, request.scope), feed)
    await limiter.open_stream(caller.project)
    return Counted(limiter, caller.project, messages, media_type="text/event-stream", headers=headers)


async def _messages(
    db: Database, job_id: str, project: str, last: int, check: Callable[[], Awaitable[None]], feed: Feed
) -> AsyncIterator[bytes]:
    """Yield the events after number `last` until the job has ended, and pings between them. `check` raises a Problem
    when the caller's key has ended."""
    yield b"retry: 2000\n\n"
    sent_at = time.monotonic()
    # The number of the event after which the job was seen not to have ended: its end is another event.
    open_at = -1
    with feed.following(job_id) as job:
        while True:
            ended = False
            try:
                await check()
                messages = job.since(last)
                if messages is None or (not messages and open_at != last):
                    rows, ended = await db.read(_read, job_id, project, last, BATCH)
                    messages = [(event.seq, message_of(event)) for event in rows]
                    open_at = last
            except (errors.NotFound, Problem, DatabaseUnavailable):
                # The client reconnects and then gets 404, 401 or 503.
                return
            for seq, message in messages:
                yield message
                last, sent_at = seq, time.monotonic()
            if messages:
                continue
            if ended:
                return
            if time.monotonic() - sent_at > PING_S:
                yield b": still here\n\n"
                sent_at = time.monotonic()
            await job.change(last, min(CHECK_S, PING_S))


def _read(connection: Connection, job_id: str, project: str, after: int, limit: int) -> tuple[list[Event], bool]:
    """Return the events after a number, and whether the job has ended. Then no event follows the newest one."""
    # Read the status first, so that an end that is committed between the two reads is not missed.
    ended = jobs.get(connection, job_id, project=project).status in TERMINAL
    return events.list_events(connection, job_id, after, limit), ended
