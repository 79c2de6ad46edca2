"""Uploads: a file is sent in one request, or in parts that each continue at an offset. The result is its digest.

What is of no use leaves nothing behind: a whole file that breaks off, and one whose bytes are not the announced ones.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, Literal

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import contextmanager_in_threadpool
from sqlalchemy import Connection
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from api.audit import Auditor
from api.dependencies import AuditDep, Caller, Config, Db, Files, LimiterDep
from api.limits import Limiter
from api.openapi import headers, made_once
from api.problems import (
    ChecksumMismatch,
    IdempotencyConflict,
    MalformedBody,
    NotFound,
    OffsetConflict,
    QuotaExceeded,
    StorageFull,
    TooLarge,
    UploadBusy,
    responses,
)
from api.routes.jobs import Key
from api.schemas import Count, Id, Json, Page, page, upload_view
from base import errors
from base.text import Text
from base.wire import UploadView
from store import collector, uploads
from store import errors as store_errors
from store.database import Database
from store.errors import BlobMismatch
from store.file_store import FileStore
from store.idempotency import Once
from store.limits import Room
from store.records import PageQuery
from store.settings import Settings
from store.uploads import Upload

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

BUFFER_BYTES = 1 << 20
SILENCE_S = 60.0
"""A client that sends nothing for this time is disconnected, because it holds the upload's lock."""

ABANDONED_S = 10.0
"""The age at which an upload that nobody sends any more can be begun again under its key."""

RAW_BODY = {
    "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}
Digest = Annotated[
    str | None, Query(pattern=r"^(sha256:)?[0-9a-f]{64}$", description="The SHA-256 of the bytes, in hexadecimal.")
]


@router.post(
    "",
    status_code=201,
    response_model=UploadView,
    responses={
        **made_once(UploadView, "Upload-Offset", "Upload-Length"),
        **responses(
            MalformedBody, QuotaExceeded, UploadBusy, TooLarge, ChecksumMismatch, IdempotencyConflict, StorageFull
        ),
    },
    openapi_extra=RAW_BODY,
)
async def create(
    *,
    request: Request,
    caller: Caller,
    db: Db,
    files: Files,
    settings: Config,
    limiter: LimiterDep,
    audit: AuditDep,
    idempotency_key: Key = None,
    filename: Annotated[str, Text(255, min_length=0)] | None = None,
    sha256: Digest = None,
    length: Annotated[Count | None, Header(alias="Upload-Length", ge=1)] = None,
) -> Response:
    """Send a file as the raw body; or, with `Upload-Length` and no body, begin an upload in parts, sent by `PATCH`.

    A model or data set is registered with the `blob` of a complete upload.

    A replay under an `Idempotency-Key` is answered with 200 and the upload as it is now, which continues at its offset.
    A body that is sent once more must have the same bytes; while the first one arrives, the answer is 409.
    """
    limit, room = await _bounds(caller.project, limiter, settings)
    size = length or announced(request)
    if size > limit:
        raise _too_large(limit)
    space = Space(files, settings.min_free_bytes)
    await space.require(size)
    digest = sha256.removeprefix("sha256:") if sha256 else None
    named: dict[str, Any] = {"filename": filename, "bytes": length, "sha256": digest}
    once = Once.of(caller.project, idempotency_key, "uploads", named)

    def begin(connection: Connection) -> tuple[Upload, bool]:
        upload, created = uploads.create_once(connection, once, caller.project, **named, room=room)
        if created:
            if room is not None and length is None:
                room.require(connection, caller.project, size)
            audit.append(connection, "upload.create", upload.id, **named)
        return upload, created

    upload, created = await db.write(begin)
    if not created and length is None and upload.status == "open":
        await _end_abandoned(upload, db, files)
        upload, created = await db.write(begin)
    made = {"Location": f"/v1/uploads/{upload.id}"}
    if created:
        if length is None:
            upload = await _receive_whole(request, upload, db, space, limit, room, audit)
        return Json(upload_view(upload), 201, {**made, **_headers(upload)})
    if length is None:
        await _require_same(request, upload, once, limit)
    return Json(upload_view(upload), 200, {**made, **_headers(upload), "Idempotent-Replayed": "true"})


@router.patch(
    "/{upload_id}",
    response_model=UploadView,
    responses={
        200: headers("Upload-Offset", "Upload-Length"),
        **responses(
            MalformedBody, QuotaExceeded, NotFound, OffsetConflict, UploadBusy, TooLarge, ChecksumMismatch, StorageFull
        ),
    },
    openapi_extra=RAW_BODY,
)
async def append(
    *,
    upload_id: Id,
    request: Request,
    caller: Caller,
    db: Db,
    files: Files,
    settings: Config,
    limiter: LimiterDep,
    audit: AuditDep,
    offset: Annotated[Count, Header(alias="Upload-Offset", description="Where these bytes begin.")],
) -> Response:
    """Send the next bytes. After a break, `GET` has the offset to continue at. The last byte completes the upload; if
    its bytes are not those of the announced `sha256`, it is deleted."""
    upload = await db.read(uploads.get, caller.project, upload_id)
    if upload.status == "complete" or offset != upload.offset:
        raise OffsetConflict(f"the upload continues at byte {upload.offset}, not at {offset}", offset=upload.offset)
    # An open upload may have all its bytes: the process ended before it completed the row. Then only complete the row.
    if upload.offset != upload.bytes:
        limit, room = await _bounds(caller.project, limiter, settings)
        size = upload.bytes if upload.bytes is not None else limit
        space = Space(files, settings.min_free_bytes)
        await space.require(announced(request))
        received = await _receive_part(request, upload, space, size - offset)
        # Announced bytes were counted when the upload began.
        arrived: dict[str, Any] = {"offset": offset, "length": received.length}
        arrived["room"] = room if upload.bytes is None else None
        upload = await db.write(uploads.append, caller.project, upload_id, **arrived)
    if upload.offset == upload.bytes:
        upload = await _complete(upload, db, files, audit)
    return Json(upload_view(upload), 200, _headers(upload))


@router.get("", response_model=Page[UploadView])
async def listing(
    caller: Caller,
    db: Db,
    query: Annotated[PageQuery, Query()],
    status: Annotated[Literal["open", "complete"] | None, Query()] = None,
) -> Response:
    """The project's uploads, newest first. Those that are not continued are deleted after a day."""
    rows, following = await db.read(uploads.list_page, caller.project, query, status)
    return page([upload_view(upload) for upload in rows], following)


@router.get(
    "/{upload_id}",
    response_model=UploadView,
    responses={200: headers("Upload-Offset", "Upload-Length", "Cache-Control"), **responses(NotFound)},
)
async def one(upload_id: Id, caller: Caller, db: Db) -> Response:
    """The progress of an upload. The headers `Upload-Offset` and `Upload-Length` have the same, for `HEAD`."""
    upload = await db.read(uploads.get, caller.project, upload_id)
    return Json(upload_view(upload), 200, {**_headers(upload), "Cache-Control": "no-store"})


@router.delete("/{upload_id}", status_code=204, responses=responses(NotFound, UploadBusy))
async def delete(upload_id: Id, caller: Caller, db: Db, files: Files, audit: AuditDep) -> Response:
    """Delete an upload, complete or not. Its bytes are deleted, too, unless a model, data set or job needs them."""
    upload = await db.read(uploads.get, caller.project, upload_id)

    def remove(connection: Connection) -> None:
        if not uploads.delete_upload(connection, upload):
            raise UploadBusy(f"upload {upload_id} has changed meanwhile; try again")
        audit.append(connection, "upload.delete", upload_id, filename=upload.filename, bytes=upload.offset)

    async with contextmanager_in_threadpool(uploads.lock_file(files, upload_id)):
        await db.write(remove)
        await to_thread.run_sync(uploads.delete_file, files, upload_id)
    if upload.status == "complete" and upload.sha256:
        await to_thread.run_sync(collector.free_blob, db, files, upload.project, upload.sha256)
    return Response(status_code=204)


@dataclass(frozen=True)
class Space:
    """The disk of the files, on which `min_free_bytes` are kept for other things than uploads."""

    files: FileStore
    min_free_bytes: int

    async def require(self, bytes: int) -> None:
        """Raise StorageFull if so many bytes do not fit. Called for each piece: others write to the disk as well."""
        await to_thread.run_sync(uploads.require_space, self.files, bytes, self.min_free_bytes)

    def write(self, file: BinaryIO, piece: bytes) -> None:
        """Write a piece, or raise StorageFull."""
        uploads.require_space(self.files, len(piece), self.min_free_bytes)
        file.write(piece)


async def _bounds(project: str, limiter: Limiter, settings: Settings) -> tuple[int, Room | None]:
    """Return the most bytes of one upload, and what the project may store."""
    own = (await limiter.of(project)).upload_bytes
    limit = settings.upload_max_bytes if own is None else min(own, settings.upload_max_bytes)
    return limit, await limiter.room(project)


async def _end_abandoned(upload: Upload, db: Database, files: FileStore) -> None:
    """Delete a whole upload whose server has ended meanwhile. Raises UploadBusy if a request may still send it."""
    async with contextmanager_in_threadpool(uploads.lock_file(files, upload.id)):
        if not await db.write(uploads.delete_upload, upload, older_than_s=ABANDONED_S):
            raise UploadBusy(f"another request sends upload {upload.id}; try again when it has ended")
        await to_thread.run_sync(uploads.delete_file, files, upload.id)


async def _require_same(request: Request, upload: Upload, once: Once | None, limit: int) -> None:
    """Read a body that was sent before. Raises IdempotencyConflict if it has other bytes."""
    assert once is not None, "only a request with a key is a replay"  # noqa: S101
    digest, length = hashlib.sha256(), 0
    try:
        async for piece in pieces(request):
            length += len(piece)
            if length > limit:
                raise _too_large(limit)
            await to_thread.run_sync(digest.update, piece)
    except ClientDisconnect:
        raise MalformedBody("the connection was closed before the end of the body") from None
    if digest.hexdigest() != upload.sha256:
        raise store_errors.IdempotencyConflict(once.key, "upload", upload.id)


async def _receive_whole(
    request: Request, upload: Upload, db: Database, space: Space, limit: int, room: Room | None, audit: Auditor
) -> Upload:
    """Store the body as one file. A body that is incomplete, too large or another than announced leaves nothing."""
    try:
        received = await _receive_part(request, upload, space, limit)
        if not received.whole or received.length == 0:
            raise MalformedBody("send the file's bytes as the body, or the header Upload-Length to send it in parts")
        arrived: dict[str, Any] = {"offset": 0, "length": received.length, "room": room}
        upload = await db.write(uploads.append, upload.project, upload.id, **arrived)
        return await _complete(upload, db, space.files, audit)
    except Exception:
        await _discard(upload, db, space.files)
        raise
    finally:
        await to_thread.run_sync(uploads.delete_file, space.files, upload.id)


async def _complete(upload: Upload, db: Database, files: FileStore, audit: Auditor) -> Upload:
    try:
        blob = await to_thread.run_sync(uploads.adopt, files, upload)
    except BlobMismatch:
        await _discard(upload, db, files)
        raise
    done = {"bytes": blob.bytes, "sha256": blob.sha256}

    def complete(connection: Connection) -> Upload:
        completed = uploads.complete(connection, upload.project, upload.id, blob)
        audit.append(connection, "upload.complete", upload.id, **done)
        return completed

    completed = await db.write(complete)
    await to_thread.run_sync(uploads.delete_file, files, upload.id)
    return completed


async def _discard(upload: Upload, db: Database, files: FileStore) -> None:
    """Delete the row and the file of an upload that is of no use. The collector deletes what remains here."""
    await to_thread.run_sync(uploads.delete_file, files, upload.id)
    with suppress(errors.DatabaseUnavailable, errors.StorageFull):
        await db.write(uploads.delete_upload, upload)


def announced(request: Request) -> int:
    """Return the length of the body that the client has announced; 0 if it has announced none."""
    length = request.headers.get("content-length", "")
    return min(int(length[:20]), 2**63) if length.isascii() and length.isdigit() else 0


def _headers(upload: Upload) -> dict[str, str]:
    offset = {"Upload-Offset": str(upload.offset)}
    return offset if upload.bytes is None else {**offset, "Upload-Length": str(upload.bytes)}


@dataclass(frozen=True)
class Received:
    length: int
    whole: bool
    """False if the client disconnected before the end."""


async def _receive_part(request: Request, upload: Upload, space: Space, max_bytes: int) -> Received:
    """Write the body to the upload's file, durably. Bytes that arrive before a disconnect are kept."""
    if announced(request) > max_bytes:
        raise _too_large(max_bytes)
    async with contextmanager_in_threadpool(uploads.open_part(space.files, upload)) as file:
        return await _receive(request, file, space, max_bytes)


async def _receive(request: Request, file: BinaryIO, space: Space, max_bytes: int) -> Received:
    """Write the body to an open file, in bounded memory. Raises TooLarge, or StorageFull."""
    length = 0
    try:
        async for piece in pieces(request):
            if length + len(piece) > max_bytes:
                raise _too_large(max_bytes)
            await to_thread.run_sync(space.write, file, piece)
            length += len(piece)
    except ClientDisconnect:
        return Received(length, whole=False)
    return Received(length, whole=True)


async def pieces(request: Request) -> AsyncIterator[bytes]:
    """Yield the body in pieces of about 1 MiB. Bytes that arrived before a disconnect come before the exception."""
    buffer = bytearray()
    chunks = request.stream()
    try:
        while (chunk := await _next(chunks)) is not None:
            buffer += chunk
            if len(buffer) >= BUFFER_BYTES:
                yield bytes(buffer)
                buffer.clear()
    except ClientDisconnect:
        yield bytes(buffer)
        raise
    yield bytes(buffer)


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    """Return the next chunk, or None at the end. Raises ClientDisconnect after SILENCE_S without one."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await anext(chunks, None)
    except TimeoutError:
        raise ClientDisconnect from None


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"at most {max_bytes} bytes are accepted here", limit_bytes=max_bytes)
