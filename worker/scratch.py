"""A folder for one attempt, removed whatever happens: by its worker, or by another one when that was killed.

Each folder has a lock file beside it, held for as long as the attempt lasts. A killed process holds nothing: so a lock
that is free proves its worker dead, and nobody on this host has to wait for the lease to lapse. Other hosts' locks
prove nothing (not every shared file system passes them on), and are left alone for a month.
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

FOREIGN_AFTER_S = 30 * 86_400
HOST = socket.gethostname()


@dataclass(frozen=True)
class Dead:
    """An attempt of this host whose worker is gone."""

    job_id: str
    fence: int


@dataclass(frozen=True)
class Scratch:
    """One attempt's folder, and the descriptor that holds its lock."""

    folder: Path
    lock: int


@contextmanager
def scratch_folder(parent: Path, job_id: str, fence: int) -> Iterator[Scratch]:
    """A new, empty folder for this attempt."""
    parent.mkdir(parents=True, exist_ok=True)
    name = f"{job_id}.{fence}.{HOST}"
    lock = parent / f"{name}.lock"
    descriptor = _hold(lock)
    folder = parent / name
    try:
        folder.mkdir()
        yield Scratch(folder, descriptor)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(parent: Path) -> list[Dead]:
    """Remove the folders that nobody holds any more; returns the attempts of this host that have died."""
    return [dead for lock in parent.glob("*.lock") if (dead := _sweep_one(lock)) is not None]


def _sweep_one(lock: Path) -> Dead | None:
    job_id, fence, host = lock.name.removesuffix(".lock").split(".", 2)
    with suppress(FileNotFoundError), lock.open("rb") as file:
        if host != HOST and time.time() - lock.stat().st_mtime < FOREIGN_AFTER_S:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        shutil.rmtree(lock.with_name(lock.name.removesuffix(".lock")), ignore_errors=True)
        lock.unlink(missing_ok=True)
        return Dead(job_id, int(fence)) if host == HOST else None
    return None


def _hold(lock: Path) -> int:
    """Open and lock a file; again if a sweep took it away in between."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock.stat().st_ino:
                return descriptor
        os.close(descriptor)
