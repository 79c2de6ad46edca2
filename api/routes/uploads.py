"""Uploads: bytes in, a digest out. In one request, or in as many as the network allows, going on at an offset."""

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.responses import Response

from api.answers import Json
from api.auth import Who
from api.database import Db, Files, Setup
from api.problems import (
    ChecksumMismatch,
    MalformedBody,
    NotFound,
    OffsetConflict,
    StorageFull,
    TooLarge,
    UploadBusy,
    responses,
)
from api.receiving import Received, receive, too_large
from api.schemas import UploadView, upload_view
from store import uploads
from store.database import Database
from store.file_store import FileStore
from store.uploads import Upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

RAW_BODY = {
    "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}
Digest = Annotated[
    str | None, Query(pattern=r"^(sha256:)?[0-9a-f]{64}$", description="What the bytes must hash to, in hexadecimal.")
]


@router.post(
    "",
    status_code=201,
    response_model=UploadView,
    responses=responses(MalformedBody, TooLarge, ChecksumMismatch, StorageFull),
    openapi_extra=RAW_BODY,
)
async def create(
    *,
    request: Request,
    who: Who,
    db: Db,
    files: Files,
    setup: Setup,
    filename: Annotated[str | None, Query(max_length=255)] = None,
    sha256: Digest = None,
    length: Annotated[int | None, Header(alias="Upload-Length", ge=1)] = None,
) -> Response:
    """Send a file as the raw body, or, with `Upload-Length` and no body, begin one that is sent in parts by `PATCH`.

    `blob` of a complete upload is what a model or data set is registered with.
    """
    limit = setup.upload_max_bytes
    if length is not None and length > limit:
        raise too_large(limit)
    wanted = sha256.removeprefix("sha256:") if sha256 else None
    upload = await db.write(uploads.create, who.project, filename=filename, bytes=length, sha256=wanted)
    if length is None:
        upload = await _take_whole(request, upload, db, files, limit)
    return Json(upload_view(upload), 201, {"Location": f"/v1/uploads/{upload.id}", **_headers(upload)})


@router.patch(
    "/{upload_id}",
    response_model=UploadView,
    responses=responses(MalformedBody, NotFound, OffsetConflict, UploadBusy, TooLarge, ChecksumMismatch, StorageFull),
    openapi_extra=RAW_BODY,
)
async def append(
    *,
    upload_id: str,
    request: Request,
    who: Who,
    db: Db,
    files: Files,
    setup: Setup,
    offset: Annotated[int, Header(alias="Upload-Offset", ge=0, description="Where these bytes begin.")],
) -> Response:
    """Send the next bytes. After a break, `GET` tells the offset to go on from. The last byte completes the upload."""
    upload = await db.read(uploads.get, who.project, upload_id)
    if upload.status == "complete" or offset != upload.offset:
        raise OffsetConflict(f"the upload goes on at byte {upload.offset}, not at {offset}", offset=upload.offset)
    # All of an open one may have come: its bytes are among the blobs perhaps, and only the row has yet to say so.
    if upload.offset != upload.bytes:
        whole = upload.bytes if upload.bytes is not None else setup.upload_max_bytes
        received = await _take(request, upload, files, whole - offset)
        upload = await db.write(uploads.append, who.project, upload_id, offset=offset, length=received.length)
    if upload.offset == upload.bytes:
        upload = await _complete(upload, db, files)
    return Json(upload_view(upload), 200, _headers(upload))


@router.api_route("/{upload_id}", methods=["HEAD"], include_in_schema=False)
@router.get("/{upload_id}", response_model=UploadView, responses=responses(NotFound))
async def one(upload_id: str, who: Who, db: Db) -> Response:
    """How far an upload is. The same stands in the headers `Upload-Offset` and `Upload-Length`, for `HEAD`."""
    upload = await db.read(uploads.get, who.project, upload_id)
    return Json(upload_view(upload), 200, {**_headers(upload), "Cache-Control": "no-store"})


async def _take_whole(request: Request, upload: Upload, db: Database, files: FileStore, limit: int) -> Upload:
    """One body is one file: what is cut short or grows too large leaves nothing behind."""
    try:
        received = await _take(request, upload, files, limit)
        if not received.whole or received.length == 0:
            raise MalformedBody("send the file's bytes as the body, or the header Upload-Length to send it in parts")
        upload = await db.write(uploads.append, upload.project, upload.id, offset=0, length=received.length)
        return await _complete(upload, db, files)
    finally:
        await to_thread.run_sync(uploads.delete_file, files, upload.id)


async def _take(request: Request, upload: Upload, files: FileStore, at_most: int) -> Received:
    """Bytes into the upload's own file, durable when this returns; of a cut body, as much as came."""
    async with contextmanager_in_threadpool(uploads.open_part(files, upload)) as file:
        return await receive(request, file, at_most)


async def _complete(upload: Upload, db: Database, files: FileStore) -> Upload:
    blob = await to_thread.run_sync(uploads.adopt, files, upload)
    upload = await db.write(uploads.complete, upload.project, upload.id, blob)
    await to_thread.run_sync(uploads.delete_file, files, upload.id)
    return upload


def _headers(upload: Upload) -> dict[str, str]:
    known = {"Upload-Offset": str(upload.offset)}
    return known if upload.bytes is None else {**known, "Upload-Length": str(upload.bytes)}
