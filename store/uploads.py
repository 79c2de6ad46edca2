"""Bytes that come in parts. The row's offset is the truth: what lies behind it in the file was never acknowledged.

create ──▶ append … append ──▶ complete
           write at the row's offset, fsync, then move the row on      hash, compare, move among the blobs, then the row
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, update

from base.files import disk_full_as_storage_full, make_folder, sync
from store import tables
from store.blobs import Blob, BlobStore
from store.clock import database_now
from store.errors import BlobMismatch, NotFound, OffsetConflict, UploadBusy
from store.ids import new_id
from store.rows import as_record, columns


@dataclass(frozen=True)
class Upload:
    id: str
    project: str
    filename: str | None
    bytes: int | None
    """The whole size: as announced, or as found once complete."""
    sha256: str | None
    """As announced, or as found once complete."""
    offset: int
    """How many bytes have come in and are durable."""
    status: str
    created_at: float


UPLOAD = columns(tables.uploads, Upload)


def create(
    connection: Connection,
    project: str,
    *,
    filename: str | None = None,
    bytes: int | None = None,
    sha256: str | None = None,
) -> Upload:
    row = {"id": new_id("up"), "project": project, "filename": filename, "bytes": bytes, "sha256": sha256}
    created = insert(tables.uploads).values(**row, created_at=database_now()).returning(*UPLOAD)
    return as_record(Upload, connection.execute(created).one())


def get(connection: Connection, project: str, upload_id: str) -> Upload:
    row = connection.execute(select(*UPLOAD).where(_is(project, upload_id))).one_or_none()
    if row is None:
        raise NotFound("upload", upload_id)
    return as_record(Upload, row)


def append(connection: Connection, project: str, upload_id: str, *, offset: int, length: int) -> Upload:
    """Acknowledge `length` bytes that are durable behind `offset`; OffsetConflict where the row is elsewhere."""
    moved = (
        update(tables.uploads)
        .where(_is(project, upload_id), tables.uploads.c.offset == offset, tables.uploads.c.status == "open")
        .values(offset=offset + length)
        .returning(*UPLOAD)
    )
    row = connection.execute(moved).one_or_none()
    if row is None:
        raise OffsetConflict(upload_id, offset, get(connection, project, upload_id).offset)
    return as_record(Upload, row)


def complete(connection: Connection, project: str, upload_id: str, blob: Blob) -> Upload:
    """Say which blob the upload became. Again with the same blob is the same answer."""
    same = (_is(project, upload_id), tables.uploads.c.offset == blob.bytes)
    done = update(tables.uploads).where(*same).values(status="complete", bytes=blob.bytes, sha256=blob.sha256)
    row = connection.execute(done.returning(*UPLOAD)).one_or_none()
    if row is None:
        raise BlobMismatch(upload_id, get(connection, project, upload_id).offset, blob.bytes)
    return as_record(Upload, row)


@contextmanager
def part(files: BlobStore, upload: Upload) -> Iterator[BinaryIO]:
    """The file, open where the next part goes: behind what is acknowledged. Durable when this ends without exception.

    One request at a time: a second one gets UploadBusy, and could only have spoilt the first.
    """
    path = files.upload_path(upload.id)
    with disk_full_as_storage_full(path.parent):
        make_folder(path.parent)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            _take(file, upload.id)
            _require_acknowledged(file, upload)
            file.seek(upload.offset)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if upload.offset == 0:
                # Its name must be as durable as its bytes.
                sync(path.parent)


def adopt(files: BlobStore, upload: Upload) -> Blob:
    """Hash what came in and move it among the blobs; BlobMismatch where it is not what was announced.

    May be asked again: bytes of the announced digest that have been moved already are simply found there.
    """
    if upload.bytes is not None and upload.offset != upload.bytes:
        raise BlobMismatch(upload.id, f"{upload.bytes} bytes", f"{upload.offset} bytes")
    path = files.upload_path(upload.id)
    try:
        with path.open("r+b") as file:
            _take(file, upload.id)
            _require_acknowledged(file, upload)
            # Behind the row's offset lies only what was never acknowledged.
            file.truncate(upload.offset)
            os.fsync(file.fileno())
            return files.adopt(path, upload.sha256)
    except FileNotFoundError:
        if upload.sha256 is not None and files.exists(upload.sha256):
            return Blob(upload.sha256, upload.offset)
        raise NotFound("file of upload", upload.id) from None


def discard(files: BlobStore, upload_id: str) -> None:
    files.upload_path(upload_id).unlink(missing_ok=True)


@contextmanager
def alone(files: BlobStore, upload_id: str) -> Iterator[None]:
    """With nobody else at the file, if there is one; UploadBusy where somebody is."""
    try:
        file = files.upload_path(upload_id).open("rb")
    except FileNotFoundError:
        yield
        return
    with file:
        _take(file, upload_id)
        yield


def older_than(connection: Connection, age_s: float) -> Sequence[Upload]:
    """Uploads of all projects that were begun so long ago, whatever came of them."""
    begun = select(*UPLOAD).where(tables.uploads.c.created_at <= database_now() - age_s)
    return [as_record(Upload, row) for row in connection.execute(begun.order_by(tables.uploads.c.id))]


def forget(connection: Connection, upload: Upload) -> bool:
    """Remove the row; False where the upload has gone on since it was read. What it became stays a blob."""
    same = (_is(upload.project, upload.id), tables.uploads.c.status == upload.status)
    gone = delete(tables.uploads).where(*same, tables.uploads.c.offset == upload.offset).returning(tables.uploads.c.id)
    return connection.execute(gone).one_or_none() is not None


def _require_acknowledged(file: BinaryIO, upload: Upload) -> None:
    """What is missing of the acknowledged bytes would be made up of zeros."""
    if os.fstat(file.fileno()).st_size < upload.offset:
        raise NotFound("file of upload", upload.id)


def _take(file: BinaryIO, upload_id: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UploadBusy(upload_id) from None


def _is(project: str, upload_id: str) -> ColumnElement[bool]:
    return and_(tables.uploads.c.id == upload_id, tables.uploads.c.project == project)
