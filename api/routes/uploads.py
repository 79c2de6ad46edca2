"""Uploads: bytes in, a digest out. In one request, or in as many as the network allows, going on at an offset."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from api.answers import Json
from api.auth import Who
from api.database import Db, Files, Setup
from api.problems import ChecksumMismatch, NotFound, OffsetConflict, StorageFull, TooLarge, responses
from api.receiving import receive
from api.schemas import UploadView, upload_view
from store import uploads

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
    responses=responses(TooLarge, ChecksumMismatch, StorageFull),
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
        raise TooLarge(f"at most {limit} bytes are taken here", limit_bytes=limit)
    wanted = sha256.removeprefix("sha256:") if sha256 else None
    upload = await db.write(uploads.create, who.project, filename=filename, bytes=length, sha256=wanted)
    headers = {"Location": f"/v1/uploads/{upload.id}", "Upload-Offset": "0"}
    if length is not None:
        return Json(upload_view(upload), 201, headers)
    end = await receive(request, files.upload_path(upload.id), 0, limit)
    upload = await _complete(upload, end, db, files)
    return Json(upload_view(upload), 201, {**headers, "Upload-Offset": str(end)})


@router.patch(
    "/{upload_id}",
    response_model=UploadView,
    responses=responses(NotFound, OffsetConflict, TooLarge, ChecksumMismatch, StorageFull),
    openapi_extra=RAW_BODY,
)
async def append(
    *,
    upload_id: str,
    request: Request,
    who: Who,
    db: Db,
    files: Files,
    offset: Annotated[int, Header(alias="Upload-Offset", ge=0, description="Where these bytes begin.")],
) -> Response:
    """Send the next bytes. After a break, `GET` tells the offset to go on from. The last byte completes the upload."""
    upload = await db.read(uploads.get, who.project, upload_id)
    if upload.status == "complete" or offset != upload.offset:
        raise OffsetConflict(f"the upload goes on at {upload.offset}, not {offset}", offset=upload.offset)
