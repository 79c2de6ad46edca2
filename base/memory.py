"""The memory of this host, and of processes on it."""

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path("/")
LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
"""The files in which a container finds its limit: of control groups version 2 and 1."""


def host_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes of memory that this process may use, by the host's size and by the container's limit."""
    try:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    return min([host, *filter(None, (_limit(root / name) for name in LIMITS))])


def _limit(path: Path) -> int | None:
    try:
        limit = path.read_text().strip()
    except OSError:
        return None
    return int(limit) if limit.isdecimal() else None


def taken_bytes(process: int, root: Path = _ROOT) -> int:
    """Return the bytes of memory that a process has taken for itself; 0 if it has ended.

    Files that it has mapped do not count: the kernel drops them when memory is short.
    """
    fields = _status(root / f"proc/{process}/status")
    own = [fields[name] for name in ("RssAnon", "RssShmem") if name in fields]
    return sum(own) if own else fields.get("VmRSS", 0)


def peak_bytes(root: Path = _ROOT) -> int:
    """Return the most memory that this process has had so far, mapped files included."""
    # Not getrusage where it can be avoided: Linux hands the peak of the program that started this process on to it.
    peak = _status(root / "proc/self/status").get("VmHWM")
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def session_of(leader: int, root: Path = _ROOT) -> list[int]:
    """Return the processes of a session, by the id of its leader."""
    found = []
    for folder in (root / "proc").glob("[0-9]*"):
        try:
            _, _, rest = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[3]) == leader:
            found.append(int(folder.name))
    return sorted(found)


def _status(path: Path) -> Mapping[str, int]:
    """Return the sizes in a process's status, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines if line.endswith(" kB"))
    return {name.removesuffix(":"): int(size) << 10 for name, size, _ in words}
