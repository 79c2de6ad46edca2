"""Uploads: files that arrive in parts. The file may have more bytes than the row's offset; they do not count.

create ──▶ append … append ──▶ complete

append      write at the row's offset, fsync, then advance the row's offset
complete    hash, compare, move the file among the blobs, then write the row

None is begun or continued that would leave less than `min_free_bytes` on the disk (`require_space`): what is left is
for the database, without which nothing could be deleted either, and for the jobs that run.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Literal

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, or_, select, update

from base.errors import StorageFull
from base.files import disk_full_as_storage_full, make_folder, sync
from store import idempotency, projects, tables
from store.errors import BlobMismatch, NotFound, OffsetConflict, UploadBusy
from store.file_store import Blob, FileStore
from store.idempotency import Once
from store.limits import Room
from store.records import PageQuery, as_record, columns, database_now, new_id, read_page


@dataclass(frozen=True)
class Upload:
    """One row of `uploads`."""

    id: str
    project: str
    filename: str | None
    bytes: int | None
    """The size that the client announced; the actual size once it is complete."""
    sha256: str | None
    """The digest that the client announced; the actual digest once it is complete."""
    offset: int
    """The number of bytes that have arrived and are durable."""
    status: str
    created_at: float

    @property
    def kind(self) -> Literal["complete", "open", "empty"]:
        """For how long it is kept: `empty` is an open one without a byte."""
        if self.status == "complete":
            return "complete"
        return "open" if self.offset else "empty"


UPLOAD_COLUMNS = columns(tables.uploads, Upload)


def create(
    connection: Connection,
    project: str,
    *,
    filename: str | None = None,
    bytes: int | None = None,
    sha256: str | None = None,
    upload_id: str | None = None,
) -> Upload:
    row = {"id": upload_id or new_id("up"), "project": project, "filename": filename, "bytes": bytes, "sha256": sha256}
    created = insert(tables.uploads).values(**row, created_at=database_now()).returning(*UPLOAD_COLUMNS)
    return as_record(Upload, connection.execute(created).one())


def create_once(
    connection: Connection,
    once: Once | None,
    project: str,
    *,
    filename: str | None = None,
    bytes: int | None = None,
    sha256: str | None = None,
    room: Room | None = None,
) -> tuple[Upload, bool]:
    """Begin an upload. Returns it, and False if the request was executed before.

    Raises QuotaExceeded if the project has no `room` for the announced bytes.
    """
    upload_id = new_id("up")
    if (known := idempotency.reserve(connection, once, upload_id)) is not None:
        return get(connection, project, known), False
    if room is not None:
        room.require(connection, project, bytes or 0)
    made = create(connection, project, filename=filename, bytes=bytes, sha256=sha256, upload_id=upload_id)
    return made, True


def get(connection: Connection, project: str, upload_id: str) -> Upload:
    row = connection.execute(select(*UPLOAD_COLUMNS).where(_is(project, upload_id))).one_or_none()
    if row is None:
        raise NotFound("upload", upload_id)
    return as_record(Upload, row)


def list_page(
    connection: Connection, project: str, query: PageQuery, status: str | None = None
) -> tuple[list[Upload], str | None]:
    """Return a page of the project's uploads, newest first, and the `after` of the next one, None at the end."""
    conditions = [tables.uploads.c.project == project]
    if status is not None:
        conditions.append(tables.uploads.c.status == status)
    return read_page(connection, tables.uploads, Upload, query, *conditions)


def append(
    connection: Connection, project: str, upload_id: str, *, offset: int, length: int, room: Room | None = None
) -> Upload:
    """Acknowledge `length` durable bytes after `offset`. Raises OffsetConflict if the row has another offset, and
    QuotaExceeded if the project has no `room` for bytes that were not announced."""
    if room is not None:
        room.require(connection, project, length)
    advanced = (
        update(tables.uploads)
        .where(_is(project, upload_id), tables.uploads.c.offset == offset, tables.uploads.c.status == "open")
        .values(offset=offset + length)
        .returning(*UPLOAD_COLUMNS)
    )
    row = connection.execute(advanced).one_or_none()
    if row is None:
        raise OffsetConflict(upload_id, offset, get(connection, project, upload_id).offset)
    return as_record(Upload, row)


def complete(connection: Connection, project: str, upload_id: str, blob: Blob) -> Upload:
    """Write the blob that the upload became into its row. Idempotent."""
    same_size = (_is(project, upload_id), tables.uploads.c.offset == blob.bytes)
    completed = update(tables.uploads).where(*same_size).values(status="complete", bytes=blob.bytes, sha256=blob.sha256)
    row = connection.execute(completed.returning(*UPLOAD_COLUMNS)).one_or_none()
    if row is None:
        raise BlobMismatch(upload_id, get(connection, project, upload_id).offset, blob.bytes)
    projects.add_blobs(connection, project, [blob.sha256])
    return as_record(Upload, row)


def require_space(files: FileStore, bytes: int, min_free_bytes: int) -> None:
    """Raise StorageFull if so many more bytes would leave less than `min_free_bytes` on the disk."""
    free = files.free_bytes()
    if free - bytes < min_free_bytes:
        raise StorageFull(
            f"{free} bytes are free for files, of which {min_free_bytes} are kept for running jobs and the database: "
            f"{bytes} more do not fit",
            "delete uploads, models, data sets or jobs that nobody needs, then collect: POST /v1/storage/collections",
        )


@contextmanager
def open_part(files: FileStore, upload: Upload) -> Iterator[BinaryIO]:
    """Open the file at its offset, for the next part. If the block ends without an exception, its writes are durable.

    Raises UploadBusy while another request has it open: their bytes would mix.
    """
    path = files.upload_path(upload.id)
    with disk_full_as_storage_full(path.parent):
        make_folder(path.parent)
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            _lock(file, upload.id)
            _require_acknowledged(file, upload)
            file.seek(upload.offset)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if upload.offset == 0:
                # The new file's name must be as durable as its bytes.
                sync(path.parent)


def adopt(files: FileStore, upload: Upload) -> Blob:
    """Hash the file and move it among the blobs. Raises BlobMismatch if its size or digest is not the announced one.

    Idempotent: the file may have been moved before; then the blob of the announced digest is used.
    """
    if upload.bytes is not None and upload.offset != upload.bytes:
        raise BlobMismatch(upload.id, f"{upload.bytes} bytes", f"{upload.offset} bytes")
    path = files.upload_path(upload.id)
    try:
        with path.open("r+b") as file:
            _lock(file, upload.id)
            _require_acknowledged(file, upload)
            file.truncate(upload.offset)
            os.fsync(file.fileno())
            return files.adopt(path, upload.sha256)
    except FileNotFoundError:
        if upload.sha256 is not None and files.exists(upload.sha256):
            return Blob(upload.sha256, upload.offset)
        raise NotFound("file of upload", upload.id) from None


def delete_file(files: FileStore, upload_id: str) -> None:
    files.upload_path(upload_id).unlink(missing_ok=True)


@contextmanager
def lock_file(files: FileStore, upload_id: str) -> Iterator[None]:
    """Lock the upload's file, if there is one. Raises UploadBusy if another request holds the lock."""
    try:
        file = files.upload_path(upload_id).open("rb")
    except FileNotFoundError:
        yield
        return
    with file:
        _lock(file, upload_id)
        yield


def list_older_than(connection: Connection, ages_s: Mapping[str, float]) -> Sequence[Upload]:
    """Return the uploads of all projects that were created at least so many seconds ago, by their `kind`."""
    rows, now = tables.uploads.c, database_now()
    kinds = {
        "complete": rows.status == "complete",
        "open": and_(rows.status == "open", rows.offset > 0),
        "empty": and_(rows.status == "open", rows.offset == 0),
    }
    old = or_(*(and_(kinds[kind], rows.created_at <= now - age_s) for kind, age_s in ages_s.items()))
    return [as_record(Upload, row) for row in connection.execute(select(*UPLOAD_COLUMNS).where(old).order_by(rows.id))]


def delete_upload(connection: Connection, upload: Upload, older_than_s: float = 0.0) -> bool:
    """Delete the row. Returns False if the upload has changed since it was read, or is younger. The blob that it became
    stays."""
    unchanged = (
        _is(upload.project, upload.id),
        tables.uploads.c.status == upload.status,
        tables.uploads.c.offset == upload.offset,
        tables.uploads.c.created_at <= database_now() - older_than_s,
    )
    deleted = delete(tables.uploads).where(*unchanged).returning(tables.uploads.c.id)
    return connection.execute(deleted).one_or_none() is not None


def _require_acknowledged(file: BinaryIO, upload: Upload) -> None:
    """Raise NotFound if acknowledged bytes are missing: writing or truncating would fill the gap with zeros."""
    if os.fstat(file.fileno()).st_size < upload.offset:
        raise NotFound("file of upload", upload.id)


def _lock(file: BinaryIO, upload_id: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UploadBusy(upload_id) from None


def _is(project: str, upload_id: str) -> ColumnElement[bool]:
    return and_(tables.uploads.c.id == upload_id, tables.uploads.c.project == project)
