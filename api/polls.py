"""The answer to GET of a job, which clients ask for again and again.

It is kept with the row's `revision`, which every change of the row increases, so that most requests read three columns
and send bytes that are there. The answer for a queued job is never kept: its position depends on other rows.
`Shortcut` stands before the routes and leaves out what FastAPI does for each request, which takes longer than all else.
It answers nothing that the route would not answer in the same way: what it does not know it passes on.
"""

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Connection
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import Problem
from base.errors import DatabaseUnavailable
from store import errors, jobs
from store.database import Database
from store.records import Job

KEPT_BYTES = 32_000_000
KEPT_ANSWER_BYTES = 1_000_000
"""The largest answer that is kept."""
SMALL_BYTES = 50_000
_VERSION = "SELECT project, status, revision FROM jobs WHERE id = {}"
_TAG = re.compile(r"[\x20-\x7e]{1,200}")
_PATH = re.compile(r"/v1/jobs/(job_[0-9a-hjkmnp-tv-z]{24})")
_ROUTE = SimpleNamespace(path="/v1/jobs/{job_id}")
"""The route that a shortcut stands for, as logs and figures name it."""

Render = Callable[[Connection, Job], dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """The body of a job's answer, and its tag."""

    project: str
    revision: int
    body: bytes
    tag: str

    def response(self, known: str | None) -> Response:
        """Return the response: 304 without a body if the client knows this one (its `If-None-Match`)."""
        headers = {"ETag": self.tag, "Cache-Control": "private, no-cache"}
        if known is not None and matches(known, self.tag):
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers=headers, media_type="application/json")


def matches(known: str, tag: str) -> bool:
    """Return whether `If-None-Match` names a tag (RFC 9110, 13.1.2: weak comparison)."""
    tags = (one.strip().removeprefix("W/") for one in known.split(","))
    return any(one in (tag, "*") for one in tags)


class Polls:
    """The answers of a process. Other processes keep their own."""

    def __init__(self, database: Database, render: Render) -> None:
        self._database, self._render = database, render
        self._kept: OrderedDict[str, Answer] = OrderedDict()
        self._bytes = 0
        self._making: dict[str, asyncio.Future[Answer]] = {}

    async def answer(self, job_id: str, project: str) -> Answer:
        """Return the answer for a job of the project. Raises NotFound."""
        row = await self._database.fetch(_VERSION, job_id)
        if row is not None and row[0] != project:
            raise errors.NotFound("job", job_id)
        if row is not None and row[1] == "queued":
            return (await self._database.read(self._read, job_id, project))[0]
        kept = self._kept.get(job_id)
        if row is not None and kept is not None and kept.revision == row[2]:
            self._kept.move_to_end(job_id)
            return kept
        # All who ask at the moment of a change wait for one read, unless it began before the change.
        while (making := self._making.get(job_id)) is not None:
            made = await asyncio.shield(making)
            if row is not None and made.project == project and made.revision >= row[2]:
                return made
        self._making[job_id] = making = asyncio.ensure_future(self._make(job_id, project, kept))
        making.add_done_callback(lambda done: self._made(job_id, done))
        return await asyncio.shield(making)

    async def _make(self, job_id: str, project: str, before: Answer | None) -> Answer:
        # An answer may have megabytes; if the last one was small, another thread would take longer than the read.
        is_small = before is not None and len(before.body) < SMALL_BYTES
        read = self._database.read if is_small else self._database.scan
        made, is_queued = await read(self._read, job_id, project)
        if not is_queued:
            self._keep(job_id, made)
        return made

    def _made(self, job_id: str, making: asyncio.Future[Answer]) -> None:
        del self._making[job_id]
        if not making.cancelled():
            making.exception()  # Who waited for it has it.

    def _read(self, connection: Connection, job_id: str, project: str) -> tuple[Answer, bool]:
        job = jobs.get(connection, job_id, project=project)
        body = to_json(self._render(connection, job))
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        return Answer(job.project, job.revision, body, tag), job.status == "queued"

    def _keep(self, job_id: str, answer: Answer) -> None:
        before = self._kept.pop(job_id, None)
        self._bytes -= len(before.body) if before else 0
        if len(answer.body) > KEPT_ANSWER_BYTES:
            return
        self._kept[job_id] = answer
        self._bytes += len(answer.body)
        while self._bytes > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest.body)


class Shortcut:
    """Middleware that answers GET of a job. Everything else, errors included, is the routes' part."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            path = _PATH.fullmatch(scope["path"])
            if path is not None and not scope["query_string"] and (response := await _response(scope, path[1])):
                scope["route"] = _ROUTE
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _response(scope: Scope, job_id: str) -> Response | None:
    state = scope["app"].state
    known = Headers(scope=scope).get("if-none-match")
    if known is not None and _TAG.fullmatch(known) is None:
        return None
    try:
        caller = await state.authentication.member(scope)
        answer: Answer = await state.polls.answer(job_id, caller.project)
    except (Problem, errors.NotFound, DatabaseUnavailable):
        return None
    return answer.response(known)
