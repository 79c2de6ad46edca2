"""The file store: one folder of files that are either complete or absent.

    blobs/ab/abcdef…                      files by their sha256
    checkpoints/<job>/<fence>/<step>.pt   by attempt, so that a stale attempt cannot damage those of another
    logs/<job>/<fence>.log                the output of an attempt
    uploads/<id>                          incomplete uploads
    predictions/<id>                      pictures that a job's models were asked about, until they are answered
    trash/abcdef…                         blobs that no row named when the collector ran; a use restores them

A file is written to a temporary name in its own folder and hashed on the way; then fsync, rename, fsync of the folder.
Without the first fsync, a power cut could leave an empty file under the final name; without the second, no file.

A blob's mtime is the time of its last use: the blob was stored, or its path was requested. The collector keeps a blob
for some time after its last use.
"""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from base.failpoints import failpoint
from base.files import DISK_FULL, disk_full_as_storage_full, files_in, make_folder, modified_at, sha256_of, sync
from store.errors import BlobMismatch

CHUNK_BYTES = 1 << 20
TEMPORARY = ".tmp"
FOLDERS = ("blobs", "checkpoints", "logs", "uploads", "trash")


@dataclass(frozen=True)
class Blob:
    sha256: str
    bytes: int


class FileStore:
    """The files of one service. All methods block: call them from a thread, not from an event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    # ── blobs ──

    def put_file(self, source: Path) -> Blob:
        """Copy a file into the blobs. The copy appears under its digest only when it is complete."""
        with source.open("rb") as file:
            return self.put_stream(_chunks(file))

    def put_stream(self, chunks: Iterable[bytes]) -> Blob:
        return self._write(chunks, self.folder / "blobs", lambda blob: self._blob_path(blob.sha256))

    def adopt(self, source: Path, sha256: str | None = None) -> Blob:
        """Move a durable file of this folder among the blobs. Raises BlobMismatch if its digest is not `sha256`."""
        blob = Blob(sha256_of(source), source.stat().st_size)
        if sha256 is not None and blob.sha256 != sha256:
            raise BlobMismatch(source.name, sha256, blob.sha256)
        target = self._blob_path(blob.sha256)
        with disk_full_as_storage_full(target.parent):
            make_folder(target.parent)
            os.utime(source)
            source.replace(target)
            sync(target.parent)
        return blob

    def share(self, source: Path, sha256: str) -> None:
        """Give a durable file of this folder a second name among the blobs, so that it outlives its first one. Where
        the file system has no hard links, it is copied. Idempotent.

        Raises FileNotFoundError if it is gone, and BlobMismatch if its bytes are others.
        """
        if self.exists(sha256):
            return
        if (found := sha256_of(source)) != sha256:
            raise BlobMismatch(source.name, sha256, found)
        target = self._blob_path(sha256)
        with disk_full_as_storage_full(target.parent):
            make_folder(target.parent)
            try:
                os.link(source, target)
            except FileExistsError:
                return
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise
                self.put_file(source)
                return
            os.utime(target)
            sync(target.parent)

    def path(self, sha256: str) -> Path:
        """Return the path of a blob, whether it exists or not. This is a use: it restores a blob from the trash."""
        path = self._blob_path(sha256)
        if not _touch(path):
            self.restore(sha256)
        return path

    def exists(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def size(self, sha256: str) -> int:
        """Return the bytes of a blob, 0 if there is none. This is no use of it."""
        try:
            return self._blob_path(sha256).stat().st_size
        except FileNotFoundError:
            return 0

    def last_used_at(self, sha256: str) -> float:
        """Return the time of a blob's last use; minus infinity if it is not among the blobs. This call is not a use."""
        try:
            return self._blob_path(sha256).stat().st_mtime
        except FileNotFoundError:
            return float("-inf")

    def move_to_trash(self, sha256: str, unused_since: float) -> bool:
        """Move a blob to the trash. Returns False if it does not exist, or was used after that time."""
        path, trash = self._blob_path(sha256), self.trash_path(sha256)
        make_folder(trash.parent)
        try:
            if path.stat().st_mtime > unused_since:
                return False
            path.replace(trash)
            if trash.stat().st_mtime <= unused_since:
                return True
        except FileNotFoundError:
            return False
        # It was used between the check and the move.
        self.restore(sha256)
        return False

    def restore(self, sha256: str) -> bool:
        """Move a blob out of the trash. Returns False if it is not there, or was put again meanwhile."""
        path, trash = self._blob_path(sha256), self.trash_path(sha256)
        if path.exists():
            return False
        try:
            with disk_full_as_storage_full(path.parent):
                # Before the move: otherwise a collector could read the old mtime after the move.
                os.utime(trash)
                trash.replace(path)
        except FileNotFoundError:
            return False
        return True

    def trash_path(self, sha256: str) -> Path:
        return self.folder / "trash" / sha256

    def _blob_path(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256[:2] / sha256

    # ── files of jobs and uploads ──

    def put_checkpoint(self, job_id: str, fence: int, step: int, source: Path, sha256: str | None = None) -> Blob:
        """Copy a checkpoint to its place. Raises BlobMismatch, and writes nothing, if its digest is not `sha256`."""
        target = self.checkpoint_path(job_id, fence, step)

        def place(blob: Blob) -> Path:
            if sha256 is not None and blob.sha256 != sha256:
                raise BlobMismatch(source.name, sha256, blob.sha256)
            return target

        with source.open("rb") as file:
            return self._write(_chunks(file), target.parent, place)

    def checkpoint_path(self, job_id: str, fence: int, step: int) -> Path:
        return self.folder / "checkpoints" / job_id / str(fence) / f"{step:09d}.pt"

    def log_path(self, job_id: str, fence: int) -> Path:
        return self.folder / "logs" / job_id / f"{fence}.log"

    def upload_path(self, upload_id: str) -> Path:
        return self.folder / "uploads" / upload_id

    def picture_path(self, prediction_id: str) -> Path:
        return self.folder / "predictions" / prediction_id

    def pictures(self, older_than_s: float) -> list[Path]:
        """Return the pictures that are so old."""
        before = self.now() - older_than_s
        return [path for path in files_in(self.folder / "predictions") if modified_at(path) <= before]

    def relative(self, path: Path) -> str:
        """Return the path relative to the folder, as rows store it, because the folder may be moved."""
        return path.relative_to(self.folder).as_posix()

    def delete_job_files(self, job_id: str) -> None:
        """Delete a deleted job's checkpoints and logs. Its blobs stay: other rows may name the same digests."""
        for folder in ("checkpoints", "logs"):
            shutil.rmtree(self.folder / folder / job_id, ignore_errors=True)

    # ── the folder as a whole ──

    def free_bytes(self) -> int:
        make_folder(self.folder)
        return shutil.disk_usage(self.folder).free

    def now(self) -> float:
        """Return the time of the clock that sets the mtimes. On a network file system it is not this host's clock."""
        make_folder(self.folder)
        os.utime(self.folder)
        return self.folder.stat().st_mtime

    def temporaries(self, older_than_s: float = 86_400) -> list[Path]:
        """Return the unfinished files of processes that were killed."""
        before = self.now() - older_than_s
        names = (path for path in files_in(self.folder) if path.name.startswith(".") and path.suffix == TEMPORARY)
        return [path for path in names if modified_at(path) <= before]

    def _write(self, chunks: Iterable[bytes], folder: Path, place: Callable[[Blob], Path]) -> Blob:
        """Write a file in `folder`, then rename it to `place(blob)`, which may depend on the digest."""
        with disk_full_as_storage_full(folder):
            make_folder(folder)
            temporary = folder / f".{secrets.token_hex(8)}{TEMPORARY}"
            try:
                blob = _fill(temporary, chunks)
                failpoint("blob.written")
                target = place(blob)
                make_folder(target.parent)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            sync(target.parent)
        return blob


def _fill(path: Path, chunks: Iterable[bytes]) -> Blob:
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Blob(digest.hexdigest(), size)


def _touch(path: Path) -> bool:
    """Set the file's mtime to now, if that is permitted. Returns False if there is no file."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EPERM, errno.EACCES):
            raise
    return True


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


@dataclass(frozen=True)
class Usage:
    files: int
    bytes: int


def measured(path: Path) -> Usage:
    """Return the usage of a file, or of all files in a folder; zero if there is none."""
    sizes = list(_sizes(path))
    return Usage(len(sizes), sum(sizes))


def _sizes(path: Path) -> Iterator[int]:
    for file in [path] if path.is_file() else files_in(path):
        # A file may vanish meanwhile.
        with suppress(FileNotFoundError):
            yield file.lstat().st_size
