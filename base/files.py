"""Files that are whole or not there: written beside their place, made durable, then renamed into it."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from base.errors import StorageFull

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Written:
    path: Path
    bytes: int
    sha256: str


def write_whole(path: Path, write: Callable[[Path], object]) -> Written:
    """Let `write` fill a temporary file, then publish it under `path`; on any failure nothing is left behind.

    Raises StorageFull where the disk is full or read-only, whatever `write` makes of that.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        digest = sha256(temporary)
        temporary.replace(path)
    except Exception as error:
        if (cause := _want_of_room(error)) is not None:
            raise StorageFull(f"no room to write {path.name}: {cause.strerror}", "free some disk space") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    # Without the folder's own fsync a power cut may forget the rename.
    sync(path.parent)
    return Written(path, path.stat().st_size, digest)


def write_text(path: Path, text: str) -> Written:
    return write_whole(path, lambda temporary: temporary.write_text(text))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _want_of_room(error: BaseException | None) -> OSError | None:
    """The system's word for a full disk; libraries put their own on top of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, durably: each new one is written into its parent before anything goes in."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    try:
        sync(folder.parent)
    except OSError:
        # Who comes next would find it there and take it for durable.
        with suppress(OSError):
            folder.rmdir()
        raise


def files_in(folder: Path) -> Iterator[Path]:
    """All files, however deep; folders that vanish while we look hold none."""
    return (Path(inside, name) for inside, _, names in os.walk(folder) for name in names)


def modified_at(path: Path) -> float:
    """A file's mtime; one that has vanished is as young as can be, so that nobody troubles about it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


@contextmanager
def disk_full_as_storage_full(folder: Path) -> Iterator[None]:
    """Tell a full, over-quota or read-only disk as what it is to the person waiting: no room, and it may come back."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise StorageFull(
            f"no room to write in {folder.name}: {error.strerror}", "free some space, then try again"
        ) from error
