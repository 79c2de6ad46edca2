"""Who really holds a lock, as the kernel tells (Linux's `/proc`; elsewhere nobody is found)."""

import os
from contextlib import suppress
from pathlib import Path


def of(lock: Path, session: int) -> list[int]:
    """Living processes of a session that hold this lock themselves, whoever took it first."""
    file = lock.stat()
    return [process for process in _members(session) if _holds(process, file)]


def _members(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(path.name)) == session:
                found.append(int(path.name))
    return found


def _holds(process: int, lock: os.stat_result) -> bool:
    # Of a process that ends meanwhile, or of another user, nothing can be read.
    with suppress(OSError):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                is_lock = os.path.samestat(descriptor.stat(), lock)
                if is_lock and "FLOCK" in Path(f"/proc/{process}/fdinfo/{descriptor.name}").read_text():
                    return True
    return False
