"""A folder for one inspection, removed whatever happens: by its server, or by the next one when that was killed.

It is locked for as long as its server uses it. A killed server holds nothing, so a folder that is free is of no use.
"""

import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from base.files import disk_full_as_storage_full

HOST = socket.gethostname()
FOREIGN_AFTER_S = 86_400
"""Other hosts' locks prove nothing, as not every shared file system passes them on; but no inspection lasts a day."""


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new, empty folder below `parent`. Raises StorageFull where there is no room for it."""
    with disk_full_as_storage_full(parent):
        parent.mkdir(parents=True, exist_ok=True)
        # A sweep must not find it between its making and its lock.
        with _locked(parent):
            folder = Path(tempfile.mkdtemp(prefix=f"{HOST}.", dir=parent))
            lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path) -> None:
    """Remove the folders that no server uses any more."""
    if not parent.is_dir():
        return
    with _locked(parent):
        for folder in parent.iterdir():
            with suppress(FileNotFoundError, BlockingIOError):
                if folder.name.startswith(f"{HOST}.") or time.time() - folder.stat().st_mtime > FOREIGN_AFTER_S:
                    with _locked(folder, fcntl.LOCK_NB):
                        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[None]:
    lock = _lock(folder, how)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path, how: int = 0) -> int:
    """A descriptor that holds the folder until it is closed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
