"""Locked scratch folders: removed by the process that made them, or by another one when that process was killed.

Beside each folder NAME.HOST is a lock file NAME.HOST.lock, which is locked for as long as a process uses the folder.
NAME has two parts, joined by one dot. The kernel releases the locks of a killed process, so a free lock proves that
the folder is abandoned. Locks of other hosts prove nothing, because not every shared file system passes them on; only
their age counts.
"""

import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

log = logging.getLogger("distillery.folders")

HOST = socket.gethostname()
LOCK, UNNAMED_LOCK = ".lock", ".new"


@dataclass(frozen=True)
class LockedFolder:
    """A folder, and the open descriptor of its lock file. A child that inherits the descriptor holds the lock too."""

    path: Path
    lock: int


@contextmanager
def locked_folder(parent: Path, name: str) -> Iterator[LockedFolder]:
    """Make the empty folder NAME.HOST below `parent`; remove it at the end. `name`: two parts, joined by one dot."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{name}.{HOST}"
    lock = folder.with_name(f"{folder.name}{LOCK}")
    descriptor = _make_locked(lock)
    try:
        folder.mkdir()
        yield LockedFolder(folder, descriptor)
    finally:
        _remove(folder, lock)
        os.close(descriptor)


def remove_abandoned(parent: Path, foreign_after_s: float, before: Callable[[str], None] | None = None) -> list[str]:
    """Remove folders that no process uses. Returns the names of those that belong to this host.

    `foreign_after_s`: the age at which folders of other hosts are removed. They are not among the names.
    `before`: called with the name of each folder of this host before it is removed, while its lock is held. If it
    raises, the folder stays, so that a later call finds it again.
    """
    for unnamed in parent.glob(f"*{UNNAMED_LOCK}"):
        _remove_if_free(unnamed)
    for lock in parent.glob(f"*{LOCK}"):
        with suppress(FileNotFoundError):
            if not _name_here(lock) and time.time() - lock.stat().st_mtime > foreign_after_s:
                _remove_if_free(lock)
    return [name for name, lock in _locks_here(parent) if _remove_if_free(lock, before and partial(before, name))]


def used_folders(parent: Path) -> dict[str, Path]:
    """Return the lock files of this host that a process holds, by the name of their folder."""
    return {name: lock for name, lock in _locks_here(parent) if _is_held(lock)}


def _locks_here(parent: Path) -> list[tuple[str, Path]]:
    return [(name, lock) for lock in parent.glob(f"*{LOCK}") if (name := _name_here(lock))]


def _name_here(lock: Path) -> str | None:
    """Return the name of a folder of this host; None for other hosts. A host's name may have dots too."""
    first, second, host = lock.name.removesuffix(LOCK).split(".", 2)
    return f"{first}.{second}" if host == HOST else None


def _remove_if_free(lock: Path, before: Callable[[], None] | None = None) -> bool:
    """Remove a free lock and its folder. Returns whether both are gone."""
    # Opened for writing, although nothing is written: NFS locks no file that is open for reading only.
    with suppress(FileNotFoundError, BlockingIOError), lock.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if before:
            before()
        return _remove(lock.with_suffix(""), lock)
    return False


def _remove(folder: Path, lock: Path) -> bool:
    """Remove the folder, then its lock. If the folder cannot be removed, the lock stays, for a later attempt."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("the folder %s cannot be removed", folder)
        return False
    lock.unlink(missing_ok=True)
    return True


def _is_held(lock: Path) -> bool:
    with suppress(FileNotFoundError), lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _make_locked(lock: Path) -> int:
    """Make a lock file that is locked before it gets its name, so that `remove_abandoned` never finds it free."""
    unnamed = lock.with_suffix(UNNAMED_LOCK)
    while True:
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            unnamed.rename(lock)
        except BaseException as error:
            os.close(descriptor)
            # The file is gone if another process removed it between the two lines: try again.
            if not isinstance(error, FileNotFoundError):
                raise
        else:
            return descriptor
