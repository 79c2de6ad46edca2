"""A folder for one attempt, removed whatever happens: by its worker, or by another one when that was killed.

Each folder has a lock file beside it, held for as long as the attempt lasts: by its worker, by its engine, and by what
that forks. A killed process holds nothing: so a lock that is free proves them all dead, and nobody on this host has to
wait for the lease to lapse. One that is held proves no more than that somebody lives; then the lease decides. Other
hosts' locks prove nothing (not every shared file system passes them on), and are left alone for a month.
"""

import fcntl
import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from worker import holders

log = logging.getLogger("distillery.scratch")

FOREIGN_AFTER_S = 30 * 86_400
HOST = socket.gethostname()
NAMED, UNNAMED = ".lock", ".new"
DEAD_IN_S = 10.0
"""How long the killed may take to end."""


@dataclass(frozen=True)
class Lock:
    """The lock file of an attempt of this host."""

    job_id: str
    fence: int
    path: Path


@dataclass(frozen=True)
class Scratch:
    """One attempt's folder, and the descriptor that holds its lock."""

    folder: Path
    lock: int

    def note(self, session: int) -> None:
        """Write down which session works here, for whoever has to end it when neither worker nor guard can."""
        os.pwrite(self.lock, f"{session:>20}\n".encode(), 0)


@contextmanager
def scratch_folder(parent: Path, job_id: str, fence: int) -> Iterator[Scratch]:
    """A new, empty folder for this attempt."""
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{job_id}.{fence}.{HOST}"
    lock = parent / f"{name}{NAMED}"
    descriptor = _hold(lock)
    folder = parent / name
    try:
        folder.mkdir()
        yield Scratch(folder, descriptor)
    finally:
        _remove_with(lock, folder)
        os.close(descriptor)


def sweep(parent: Path) -> list[Lock]:
    """Remove what nobody holds any more; returns the locks of this host's attempts that have died."""
    for unnamed in parent.glob(f"*{UNNAMED}"):
        _remove(unnamed)
    _remove_foreign(parent)
    return [lock for lock in _locks(parent) if _remove(lock.path)]


def held(parent: Path) -> list[Lock]:
    """Locks of this host that somebody holds."""
    return [lock for lock in _locks(parent) if _is_held(lock.path)]


def end(lock: Lock) -> bool:
    """Kill the session of an attempt that has lost its job; False where none is left.

    No worker is ever killed: it holds the lock too, but not in the session that it wrote there.
    """
    with suppress(FileNotFoundError, ValueError, ProcessLookupError):
        session = int(lock.path.read_bytes())
        if holders.of(lock.path, session):
            os.killpg(session, signal.SIGKILL)
            deadline = time.monotonic() + DEAD_IN_S
            while holders.of(lock.path, session) and time.monotonic() < deadline:
                time.sleep(0.01)
            return True
    return False


def _locks(parent: Path) -> Iterator[Lock]:
    for path in parent.glob(f"*{NAMED}"):
        job_id, fence, host = path.name.removesuffix(NAMED).split(".", 2)
        if host == HOST:
            yield Lock(job_id, int(fence), path)


def _remove_foreign(parent: Path) -> None:
    """Other hosts' locks, once they are so old that nobody can mean them."""
    for path in parent.glob(f"*{NAMED}"):
        with suppress(FileNotFoundError):
            if not path.name.endswith(f".{HOST}{NAMED}") and time.time() - path.stat().st_mtime > FOREIGN_AFTER_S:
                _remove(path)


def _remove(lock: Path) -> bool:
    """Remove a lock that is free, and its folder; whether both are gone."""
    # For writing, although nothing is written: NFS locks nothing that is open for reading only.
    with suppress(FileNotFoundError, BlockingIOError), lock.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _remove_with(lock, lock.with_suffix(""))
    return False


def _remove_with(lock: Path, folder: Path) -> bool:
    """The folder, and then its lock; that stays beside a folder that stays, for a later sweep to find both."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("%s cannot be removed as yet", folder)
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


def _hold(lock: Path) -> int:
    """Make a lock file that is held before it has its name: so a sweep never finds it free."""
    unnamed = lock.with_suffix(UNNAMED)
    while True:
        descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            unnamed.rename(lock)
        except BaseException as error:
            os.close(descriptor)
            # Gone, where a sweep was in between: then once more.
            if not isinstance(error, FileNotFoundError):
                raise
        else:
            return descriptor
