"""Files that are whole or not there, in one folder.

    blobs/ab/abcdef…                  bytes known by their sha256
    checkpoints/<job>/<fence>/<step>.pt   under the fence, so that a stale attempt spoils only its own
    logs/<job>/<fence>.log            what an attempt printed
    uploads/<id>                      bytes that are still coming in
    trash/abcdef…                     blobs that no row named when the collector looked; to ask for one brings it back

A file is written to a temporary name in its own folder while it is hashed; then fsync, rename, fsync of the folder.
Without the first fsync a power cut leaves an empty file under the final name; without the second, none.

A blob's mtime says when it was last put or asked for: who has asked for one can count on it for a while.
"""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from base.failpoints import failpoint
from base.files import DISK_FULL, disk_full_as_storage_full, files_in, make_folder, modified_at, sync
from store.errors import BlobMismatch

CHUNK = 1 << 20
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Blob:
    sha256: str
    bytes: int


class BlobStore:
    """The files of one service. Every method is plain and blocking: an event loop sends it to a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def put_file(self, source: Path) -> Blob:
        """Copy a file in. The copy may take long; what is seen under its digest is whole at once."""
        with source.open("rb") as file:
            return self.put_stream(_chunks(file))

    def put_stream(self, chunks: Iterable[bytes]) -> Blob:
        return self._write(chunks, self.folder / "blobs", lambda blob: self._place(blob.sha256))

    def put_checkpoint(self, job_id: str, fence: int, step: int, source: Path, sha256: str | None = None) -> Blob:
        """Copy a checkpoint to its place; BlobMismatch, and nothing there, where it is not what was announced."""
        target = self.checkpoint_path(job_id, fence, step)

        def place(blob: Blob) -> Path:
            if sha256 is not None and blob.sha256 != sha256:
                raise BlobMismatch(source.name, sha256, blob.sha256)
            return target

        with source.open("rb") as file:
            return self._write(_chunks(file), target.parent, place)

    def adopt(self, source: Path, sha256: str | None = None) -> Blob:
        """Move a durable file of this folder to its place among the blobs; BlobMismatch as above."""
        with source.open("rb") as file:
            blob = Blob(hashlib.file_digest(file, "sha256").hexdigest(), source.stat().st_size)
        if sha256 is not None and blob.sha256 != sha256:
            raise BlobMismatch(source.name, sha256, blob.sha256)
        target = self._place(blob.sha256)
        with disk_full_as_storage_full(target.parent):
            make_folder(target.parent)
            os.utime(source)
            source.replace(target)
            sync(target.parent)
        return blob

    def path(self, sha256: str) -> Path:
        """Where a blob lies, or would. To ask is to need it: it comes back from the trash, and stays for a while."""
        place = self._place(sha256)
        if not _touch(place):
            self.bring_back(sha256)
        return place

    def exists(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def throw_away(self, sha256: str, untouched_since: float) -> bool:
        """Move a blob to the trash; False where it is gone, or somebody has put it or asked for it since then."""
        place, trash = self._place(sha256), self.trash_path(sha256)
        make_folder(trash.parent)
        try:
            if place.stat().st_mtime > untouched_since:
                return False
            place.replace(trash)
            if trash.stat().st_mtime <= untouched_since:
                return True
        except FileNotFoundError:
            return False
        # Somebody asked between our look and our move, and was told that it is there.
        self.bring_back(sha256)
        return False

    def bring_back(self, sha256: str) -> bool:
        """Move a blob out of the trash; False where there is none, or its place has been filled again."""
        place, trash = self._place(sha256), self.trash_path(sha256)
        if place.exists():
            return False
        try:
            with disk_full_as_storage_full(place.parent):
                # First, or a collector would see it old in its place.
                os.utime(trash)
                trash.replace(place)
        except FileNotFoundError:
            return False
        return True

    def touched_at(self, sha256: str) -> float:
        """When a blob was last put or asked for, which this is not; minus infinity where it is not in its place."""
        try:
            return self._place(sha256).stat().st_mtime
        except FileNotFoundError:
            return float("-inf")

    def trash_path(self, sha256: str) -> Path:
        return self.folder / "trash" / sha256

    def checkpoint_path(self, job_id: str, fence: int, step: int) -> Path:
        return self.folder / "checkpoints" / job_id / str(fence) / f"{step:09d}.pt"

    def log_path(self, job_id: str, fence: int) -> Path:
        return self.folder / "logs" / job_id / f"{fence}.log"

    def upload_path(self, upload_id: str) -> Path:
        return self.folder / "uploads" / upload_id

    def relative(self, path: Path) -> str:
        """How a row names a file: the folder may move."""
        return path.relative_to(self.folder).as_posix()

    def forget_job(self, job_id: str) -> None:
        """Remove a deleted job's checkpoints and logs. Blobs stay: others may hold the same bytes."""
        for kind in ("checkpoints", "logs"):
            shutil.rmtree(self.folder / kind / job_id, ignore_errors=True)

    def free_bytes(self) -> int:
        make_folder(self.folder)
        return shutil.disk_usage(self.folder).free

    def now(self) -> float:
        """The time by the clock that stamps these files, which need not be this host's."""
        make_folder(self.folder)
        os.utime(self.folder)
        return self.folder.stat().st_mtime

    def temporaries(self, older_than_s: float = 86_400) -> list[Path]:
        """What killed processes left half written."""
        before = self.now() - older_than_s
        names = (path for path in files_in(self.folder) if path.name.startswith(".") and path.suffix == TEMPORARY)
        return [path for path in names if modified_at(path) <= before]

    def _place(self, sha256: str) -> Path:
        return self.folder / "blobs" / sha256[:2] / sha256

    def _write(self, chunks: Iterable[bytes], folder: Path, place: Callable[[Blob], Path]) -> Blob:
        """Write beside the place, hashing; where the place is comes last, since it may be named by the hash."""
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
    """Whether it is there; if so it is young again, where we may say so."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EPERM, errno.EACCES):
            raise
    return True


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        yield chunk
