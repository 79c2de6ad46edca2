"""A folder for one attempt, removed whatever happens: by its worker, or by the next one when that was killed.

Each folder has a lock file beside it, held for as long as the folder is in use. A killed process holds nothing.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new, empty folder `parent/name`."""
    parent.mkdir(parents=True, exist_ok=True)
    lock = parent / f"{name}.lock"
    descriptor = _hold(lock)
    folder = parent / name
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(parent: Path) -> list[Path]:
    """Remove the folders that nobody holds any more."""
    swept = []
    for lock in parent.glob("*.lock"):
        with suppress(FileNotFoundError), lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            folder = lock.with_suffix("")
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
            swept.append(folder)
    return swept


def _hold(lock: Path) -> int:
    """Open and lock a file; again if a sweep took it away in between."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:
                return descriptor
        os.close(descriptor)
