"""Files that are either complete or absent: they are written under a temporary name, synced, then renamed."""

import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from base.errors import StorageFull, TooManyFiles

log = logging.getLogger("distillery.files")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE)
"""The errors of a process that may open no more files, and of a host that may open no more."""


@dataclass(frozen=True)
class Written:
    path: Path
    bytes: int
    sha256: str


def write_whole(path: Path, write: Callable[[Path], object]) -> Written:
    """Let `write` fill a temporary file, then rename it to `path`. If anything fails, nothing is left.

    Raises StorageFull if the disk is full or read-only, even if `write` raises another error for it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        write(temporary)
        sync(temporary)
        digest = sha256_of(temporary)
        temporary.replace(path)
    except Exception as error:
        if (cause := _caused_by(error, DISK_FULL)) is not None:
            raise storage_full(cause, path.name) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    # Without the folder's fsync, a power cut may undo the rename.
    sync(path.parent)
    return Written(path, path.stat().st_size, digest)


def write_text(path: Path, text: str) -> Written:
    return write_whole(path, lambda temporary: temporary.write_text(text))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def too_many_files(error: BaseException) -> TooManyFiles | None:
    """Return the error of a job that was stopped because no file could be opened, if that caused `error`."""
    cause = _caused_by(error, NO_DESCRIPTOR)
    if cause is None:
        return None
    return TooManyFiles(f"no file can be opened: {cause.strerror}", "close files or connections, or raise ulimit -n")


def _caused_by(error: BaseException | None, numbers: Sequence[int]) -> OSError | None:
    """Return the operating system's error with one of these numbers if it caused `error`. Libraries wrap it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
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
    """Make a folder and its parents durably: the name of each is synced before anything is put into it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    try:
        sync(folder.parent)
    except OSError:
        # Otherwise the next caller would find the folder and assume that it is durable.
        with suppress(OSError):
            folder.rmdir()
        raise


def files_in(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder. Folders that vanish meanwhile have none."""
    return (Path(inside, name) for inside, _, names in os.walk(folder) for name in names)


def modified_at(path: Path) -> float:
    """Return a file's mtime; infinity if it has vanished, so that it is too young to be deleted."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


@contextmanager
def disk_full_as_storage_full(folder: Path) -> Iterator[None]:
    """Raise StorageFull if the block raises the error of a full, over-quota or read-only disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise storage_full(error, f"in {folder.name}") from error


def storage_full(error: OSError, what: str = "") -> StorageFull:
    """Return the engine's error for one of the errors DISK_FULL while `what` was written."""
    what = f" {what}" if what else ""
    if error.errno == errno.EROFS:
        # Freeing space does not help, so it is not called a full disk.
        return StorageFull(
            f"cannot write{what}: {error.strerror}", "the disk is mounted for reading only: mount it for writing"
        )
    return StorageFull(f"no disk space to write{what}: {error.strerror}", "free some disk space, then try again")


# ── rights ──

OTHERS = 0o077
"""The rights of a file's group and of all others."""


def keep_private(*places: Path) -> None:
    """Take all rights to these files and folders, and to what is in them, from everybody but their owner.

    A folder is changed after what is in it: if its own rights are right, so is the rest, which is not looked at again.
    """
    for named in places:
        place = named.resolve()  # the folder may be a link to another disk
        if not (place.exists() and _mode(place) & OTHERS):
            continue
        for inside, folders, files in os.walk(place, topdown=False):
            for name in (*files, *folders):
                take_rights(Path(inside, name))
        take_rights(place)


def take_rights(path: Path, rights: int = OTHERS) -> None:
    """Take these rights to a file or folder. A path that vanishes is no fault; one of another user is a warning."""
    try:
        mode = _mode(path)
        if mode & rights and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(mode) & ~rights)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("others may be able to read %s, whose rights cannot be changed: %s", path, error.strerror)


def _mode(path: Path) -> int:
    return path.lstat().st_mode
