"""The cores of this host: those that this process may use, those that other processes use at the moment, and what they
can do."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

AT_MOST = "DISTILLERY_THREADS_AT_MOST"
"""The variable by which a worker tells its engine how many threads it may take, where the operator has set no number:
the engine takes fewer while other processes need the cores."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""The variables for the threads of numerical libraries. A number in the first one is the operator's."""
LOOK_S = 0.1
"""The time of one look at the load, ten ticks of the kernel's clock."""
LOOKS = 10
"""Looks that a load must outlast to count: a burst, as of a program's start, is no neighbour."""
BUSY = 0.5
"""Cores in use by others from which one core less counts as free."""
CPUS = Path("/proc/cpuinfo")
_ROOT = Path("/")


def flags() -> set[str]:
    """Return the names of what the CPU can do, as Linux has them. Empty where the system does not tell."""
    try:
        text = CPUS.read_text()
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")), set())


def cores(root: Path = _ROOT) -> int:
    """Return the number of cores that this process may use, by affinity and by the quota of its control groups."""
    allowed = len(_allowed())
    return max(1, min(allowed, round(quota(root) or allowed)))


def asked_threads(environment: Mapping[str, str]) -> int | None:
    """Return the number of threads that the operator has set in an environment; None if there is none."""
    number = environment.get(THREADS[0], "")
    return int(number) if number.isdecimal() and int(number) and AT_MOST not in environment else None


def quota(root: Path = _ROOT) -> float | None:
    """Return the smallest CPU quota of this process's control groups (version 1 and 2), in cores; None without one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    found = [limit for line in (*lines, "0::/") for limit in _quotas_of(line, root / "sys/fs/cgroup")]
    return min(found, default=None)


def _quotas_of(line: str, mount: Path) -> Iterator[float]:
    """Yield the quotas of a control group, which is a line of /proc/self/cgroup, and of all groups that contain it.

    In a container, the path may be that of the host, which does not exist there: then the mount itself is the group.
    """
    _, controllers, path = line.split(":", 2)
    folder = mount / controllers if controllers else mount
    if controllers and "cpu" not in controllers.split(","):
        return
    if controllers and not folder.is_dir():
        folder = mount / "cpu"
    group = folder / path.lstrip("/")
    for one in (group, *group.parents):
        yield from _quota_in(one)
        if one == folder:
            return


def _quota_in(group: Path) -> Iterator[float]:
    texts = []
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            texts.append(" ".join((group / name).read_text() for name in names))
        except OSError:
            continue
    for text in texts:
        numbers = text.split()
        # "max" and -1 stand for no quota.
        if len(numbers) == 2 and all(number.isdecimal() for number in numbers) and int(numbers[1]):
            yield int(numbers[0]) / int(numbers[1])


@dataclass(frozen=True)
class CpuTime:
    """CPU time on the cores of this process, in seconds: used by everybody, used by this process, and the time for
    which threads of this process have waited for a core."""

    at: float
    everybody: float
    own: float
    waited: float

    @classmethod
    def now(cls, root: Path = _ROOT) -> Self | None:
        """Return it as it is now; None where the kernel does not tell."""
        try:
            lines = (root / "proc/stat").read_text().splitlines()
        except OSError:
            return None
        names = {f"cpu{core}" for core in _allowed()}
        rows = [line.split() for line in lines]
        ticks = sum(_busy_ticks(row[1:]) for row in rows if row and row[0] in names)
        own = os.times()
        if not ticks:
            return None
        return cls(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system, _waited(root))

    def others_since(self, before: "CpuTime") -> float:
        """Return the cores that other processes have needed since an earlier time, on average: what they used, and what
        they would have used of the time for which this process let them wait, which is about the time it waited itself.
        """
        seconds = max(self.at - before.at, 1e-9)
        used = max(0.0, (self.everybody - before.everybody - (self.own - before.own)) / seconds)
        return used + min(used, max(0.0, self.waited - before.waited) / seconds)


def _waited(root: Path) -> float:
    """Return the seconds for which all threads of this process together have waited for a core."""
    nanoseconds = 0
    for statistics in (root / "proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(statistics.read_text().split()[1])
        except (OSError, IndexError, ValueError):
            continue  # The thread has ended, or the kernel does not count.
    return nanoseconds / 1e9


def _busy_ticks(counters: list[str]) -> int:
    """Return the ticks of a core in which somebody computed. Steal is what other machines of the host took."""
    user, nice, system, _idle, _waiting, irq, soft_irq, steal = (int(one) for one in counters[:8])
    return user + nice + system + irq + soft_irq + steal


def busy() -> float:
    """Return the cores that other processes use now: the least of some looks, so that a short burst does not count.

    One look takes LOOK_S; only on a busy machine there are more. Where the kernel does not tell, the load of the last
    minute.
    """
    least = float("inf")
    for _ in range(LOOKS):
        before = CpuTime.now()
        time.sleep(LOOK_S)
        after = CpuTime.now()
        if before is None or after is None:
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        least = min(least, after.others_since(before))
        if least < BUSY:
            break
    return least


def free_cores(in_use: float) -> int:
    """Return the cores that are free while others use `in_use` of them; one at least."""
    return max(1, int(len(_allowed()) - in_use + 1 - BUSY))


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
