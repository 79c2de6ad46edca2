"""Files that are whole or not there: written beside their place, made durable, then renamed into it."""

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kdcore.errors import StorageFull

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


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
        _sync(temporary)
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
    _sync(path.parent)
    return Written(path, path.stat().st_size, digest)


def write_text(path: Path, text: str) -> Written:
    return write_whole(path, lambda temporary: temporary.write_text(text))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _want_of_room(error: BaseException | None) -> OSError | None:
    """The system's word for a full disk; libraries put their own on top of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
