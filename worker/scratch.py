"""The scratch folder of an attempt, JOB.FENCE.HOST, and how an engine that outlived its worker is ended.

The folder's lock is held by the worker, by the engine, and by all processes that the engine forks. A free lock proves
that all of them are dead, so the job need not wait for its lease to expire. A lock that is held proves only that one of
them lives; then the lease decides.
"""

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from base.folders import LockedFolder, locked_folder, remove_abandoned, used_folders

log = logging.getLogger("distillery.scratch")

FOREIGN_AFTER_S = 30 * 86_400
"""The age at which folders of other hosts are removed: no training lasts a month."""
DEAD_IN_S = 10.0
"""The longest time that killed processes may take to end."""


@dataclass(frozen=True)
class AttemptId:
    job_id: str
    fence: int

    @classmethod
    def parse(cls, folder: str) -> "AttemptId":
        job_id, fence = folder.split(".")
        return cls(job_id, int(fence))


def scratch_folder(parent: Path, job_id: str, fence: int) -> AbstractContextManager[LockedFolder]:
    """Make the empty folder of this attempt; it is removed at the end of the block."""
    return locked_folder(parent, f"{job_id}.{fence}")


def remove_dead(parent: Path, requeue: Callable[[AttemptId], None]) -> None:
    """Remove folders that no process uses.

    `requeue` is called with each attempt of this host before its folder is removed. The folder is the only trace of
    the attempt here: if `requeue` raises, it stays.
    """
    remove_abandoned(parent, FOREIGN_AFTER_S, lambda name: requeue(AttemptId.parse(name)))


def attempts_in_use(parent: Path) -> dict[AttemptId, Path]:
    """Return the attempts of this host whose lock a process holds, with the lock's file."""
    return {AttemptId.parse(name): lock for name, lock in used_folders(parent).items()}


def write_session(folder: LockedFolder, session: int) -> None:
    """Write the id of the engine's session into the lock file, for `kill_session`."""
    os.pwrite(folder.lock, f"{session:>20}\n".encode(), 0)


def kill_session(lock: Path) -> bool:
    """Kill the engine's session of an attempt that has lost its job. Returns False if no process of it holds the lock.

    A worker holds the lock too, but is not in that session, so it is never killed.
    """
    with suppress(FileNotFoundError, ValueError, ProcessLookupError):
        session = int(lock.read_bytes())
        if _holders(lock, session):
            os.killpg(session, signal.SIGKILL)
            deadline = time.monotonic() + DEAD_IN_S
            while _holders(lock, session) and time.monotonic() < deadline:
                time.sleep(0.01)
            return True
    return False


def end_outlived(attempt: AttemptId, lock: Path) -> None:
    """End the engine of an attempt that has lost its job: its guard was frozen, and its worker died."""
    if kill_session(lock):
        log.warning("job %s: killed the engine of fence %d, which outlived its lease", attempt.job_id, attempt.fence)


def _holders(lock: Path, session: int) -> list[int]:
    """Return the living processes of a session that hold this lock, from Linux's `/proc`; none on other systems."""
    file = lock.stat()
    return [process for process in _members(session) if _holds(process, file)]


def _members(session: int) -> list[int]:
    members = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(path.name)) == session:
                members.append(int(path.name))
    return members


def _holds(process: int, lock: os.stat_result) -> bool:
    # Processes that have just ended, or that another user runs, cannot be read.
    with suppress(OSError):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                is_lock = os.path.samestat(descriptor.stat(), lock)
                if is_lock and "FLOCK" in Path(f"/proc/{process}/fdinfo/{descriptor.name}").read_text():
                    return True
    return False
