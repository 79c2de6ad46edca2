"""The files of a succeeded job: listed with their digests, and downloaded by name, whole or in ranges."""

import base64
import os
import re
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from sqlalchemy import Connection
from starlette.datastructures import Headers
from starlette.responses import FileResponse, Response
from starlette.types import Message, Receive, Scope, Send

from api.dependencies import Caller, Db, Files
from api.openapi import headers
from api.problems import NotFound, NotReady, RangeUnsatisfiable, responses
from api.schemas import Id, Page, artifact_view, page
from base.references import STUDENT_FILE
from base.wire import ArtifactView
from store import artifacts, errors, jobs
from store.artifacts import Artifact

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])

BYTES = {"schema": {"type": "string", "format": "binary"}}
OF_ONE = ("ETag", "Repr-Digest", "X-Checksum-SHA256", "Cache-Control")
OF_CONTENT = (*OF_ONE, "Accept-Ranges", "Content-Disposition", "Last-Modified")
READ_IN_PLACE = "text/html"
"""A page that a job has made opens in the browser. It runs nothing and loads nothing, and has no origin: what it holds
comes from names that others gave."""
OF_A_PAGE = (
    "sandbox allow-popups; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
A_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": BYTES, "application/json": {"schema": {}}}, **headers(*OF_CONTENT)},
    206: {
        "description": "The bytes of the requested `Range`; of several, each with its own `Content-Range`.",
        "content": {"application/octet-stream": BYTES, "application/json": BYTES, "multipart/byteranges": BYTES},
        **headers(*OF_CONTENT, "Content-Range"),
    },
    304: {"description": "You have these bytes: `If-None-Match` has their digest.", **headers(*OF_ONE)},
    **responses(NotFound, NotReady, RangeUnsatisfiable),
}


@router.get("/artifacts", response_model=Page[ArtifactView], responses=responses(NotFound))
async def listing(job_id: Id, caller: Caller, db: Db) -> Response:
    """The job's files, with size and SHA-256. A job publishes all of them at once, when it succeeds."""
    rows = await db.read(jobs.read_of_job, job_id, caller.project, artifacts.list_artifacts)
    return page([artifact_view(artifact) for artifact in rows])


@router.get("/checkpoint", response_class=FileResponse, responses=A_FILE)
async def checkpoint(job_id: Id, request: Request, caller: Caller, db: Db, files: Files) -> Response:
    """The student's weights: a safetensors file whose metadata describes the network and its input."""
    return _download(*await db.read(_named, job_id, caller.project, STUDENT_FILE), request, files)


@router.get("/artifacts/{name}", response_class=FileResponse, responses=A_FILE)
async def one(*, job_id: Id, name: Id, request: Request, caller: Caller, db: Db, files: Files) -> Response:
    """One file, whole or in ranges. `ETag` is its SHA-256, so that a download can be resumed and checked."""
    return _download(*await db.read(_named, job_id, caller.project, name), request, files)


def _named(connection: Connection, job_id: str, project: str, name: str) -> tuple[Artifact, float]:
    """Return a job's artifact, and when it was made."""
    job = jobs.get(connection, job_id, project=project)
    try:
        return artifacts.get(connection, job_id, name), job.finished_at or job.created_at
    except errors.NotFound:
        if job.status != "succeeded":
            detail = f"job {job_id} is {job.status}: its files appear together when it succeeds"
            raise NotReady(detail, job_status=job.status) from None
        names = [artifact.name for artifact in artifacts.list_artifacts(connection, job_id)]
        detail = f"job {job_id} made no {name!r}; it made {', '.join(names) or 'nothing'}"
        raise NotFound(detail, allowed=names) from None


def _download(artifact: Artifact, made_at: float, request: Request, files: Files) -> Response:
    etag = f'"{artifact.sha256}"'
    headers = {
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(artifact.sha256)).decode()}:",
        "X-Checksum-SHA256": artifact.sha256,
        "Cache-Control": "private, no-cache",
    }
    tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in tags or tags == ["*"]:
        return Response(status_code=304, headers=headers)
    in_place = artifact.media_type.partition(";")[0] == READ_IN_PLACE
    if in_place:
        headers["Content-Security-Policy"] = OF_A_PAGE
    how = {"filename": artifact.name, "content_disposition_type": "inline" if in_place else "attachment"}
    return Download(files.path(artifact.sha256), made_at, headers=headers, media_type=artifact.media_type, **how)


_RANGE = re.compile(
    r"bytes\s*=\s*{0}(\s*,\s*{0})*\s*".format(r"(\d{1,18}-\d{0,18}|-\d{1,18})"), re.ASCII | re.IGNORECASE
)


class Download(FileResponse):
    """A stored file, whole or in ranges.

    `Last-Modified` is when its content was made: the file's own time says when it was last used. A range that cannot be
    satisfied becomes a problem. A range of other units, or that is none, is ignored (RFC 9110, 14.2).
    """

    def __init__(self, path: Path, made_at: float, headers: Mapping[str, str], **more: Any) -> None:
        super().__init__(path, headers={**headers, "Last-Modified": formatdate(made_at, usegmt=True)}, **more)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = False
        if not _RANGE.fullmatch(Headers(scope=scope).get("range", "")):
            scope = {**scope, "headers": [header for header in scope["headers"] if header[0] != b"range"]}

        async def send_or_refuse(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                refused = True
            if not refused:
                await send(message)

        await super().__call__(scope, receive, send_or_refuse)
        if refused:
            size = (await to_thread.run_sync(os.stat, self.path)).st_size
            problem = RangeUnsatisfiable(f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
            await problem.response(str(scope.get("request_id", "")))(scope, receive, send)
