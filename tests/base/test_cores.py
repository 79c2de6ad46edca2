"""The cores of a host, read from files as the kernel writes them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from base import cores
from base.cores import CpuTime, asked_threads, free_cores, quota

Write = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write files below a folder that stands for the root, and return it."""

    def files(contents: Mapping[str, str]) -> Path:
        for name, content in contents.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return tmp_path

    return files


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: {0, 1})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
        # A unit of systemd has the quota of its slice, if that is smaller.
        (
            {
                "proc/self/cgroup": "0::/jobs.slice/one.service\n",
                "sys/fs/cgroup/jobs.slice/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/jobs.slice/one.service/cpu.max": "300000 100000\n",
            },
            2,
        ),
        # A container that sees the path of the host, which its mount does not have.
        ({"proc/self/cgroup": "0::/docker/ab12\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "3:cpuset:/\n2:cpu,cpuacct:/docker/ab12\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab12/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/ab12/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
    ],
)
def test_quota_is_the_smallest_of_the_control_groups(write: Write, files: Mapping[str, str], expected: float | None):
    assert quota(write(files)) == expected


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(("content", "number"), [("max 100000", 2), ("40000 100000", 1), ("900000 100000", 2)])
def test_cores_are_those_of_affinity_and_quota(write: Write, content: str, number: int):
    assert cores.cores(write({"sys/fs/cgroup/cpu.max": content})) == number


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(("in_use", "free"), [(0, 2), (0.5, 2), (0.6, 1), (1.0, 1), (7, 1)])
def test_free_cores_leave_others_theirs(in_use: float, free: int):
    assert free_cores(in_use) == free


@pytest.mark.parametrize(
    ("environment", "number"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "4,2"}, None),
        ({"OMP_NUM_THREADS": "3", cores.AT_MOST: "3"}, None),
    ],
)
def test_asked_threads_are_not_those_that_a_worker_has_derived(environment: dict[str, str], number: int | None):
    assert asked_threads(environment) == number


@pytest.mark.usefixtures("two_cores")
def test_cpu_time_counts_the_cores_of_this_process_without_what_is_idle(write: Write):
    root = write(
        {
            "proc/stat": "cpu 9 9 9 9 9 9 9 9\ncpu0 100 20 30 5000 40 5 6 7 8 9\n"
            "cpu1 10 0 0 0 0 0 0 0 0 0\ncpu2 9999 0 0 0 0 0 0 0 0 0\nintr 5\n",
            "proc/self/task/1/schedstat": "5 1500000000 3\n",
            "proc/self/task/2/schedstat": "5 500000000 3\n",
        }
    )
    now = CpuTime.now(root)
    assert now is not None
    assert (now.everybody, now.waited) == (178 / os.sysconf("SC_CLK_TCK"), 2.0)


def test_cpu_time_is_unknown_where_the_kernel_does_not_tell(tmp_path: Path):
    assert CpuTime.now(tmp_path) is None


@pytest.mark.parametrize(
    ("everybody", "own", "waited", "needed"),
    [
        (20, 20, 0, 0.0),  # alone
        (20, 10, 0, 1.0),  # a neighbour on a core of its own
        (20, 15, 5, 1.0),  # a neighbour that shares a core with one of two threads
        (20, 20, 30, 0.0),  # more threads of its own than cores
        (10, 11, 0, 0.0),  # rounding of the kernel's ticks
    ],
)
def test_others_since_counts_what_others_used_and_would_have_used(
    everybody: float, own: float, waited: float, needed: float
):
    before, after = CpuTime(0, 0, 0, 0), CpuTime(10, everybody, own, waited)
    assert after.others_since(before) == pytest.approx(needed)


@pytest.mark.parametrize(
    ("shares", "looks", "least"),
    [([0.1], 1, 0.1), ([1.0, 1.0, 0.2], 3, 0.2), ([1.0] * cores.LOOKS, cores.LOOKS, 1.0)],
)
def test_busy_waits_for_the_end_of_a_burst(
    monkeypatch: pytest.MonkeyPatch, shares: list[float], looks: int, least: float
):
    left, slept = iter(shares), list[float]()
    monkeypatch.setattr(cores.time, "sleep", slept.append)
    monkeypatch.setattr(CpuTime, "now", lambda: CpuTime(0, 0, 0, 0))
    monkeypatch.setattr(CpuTime, "others_since", lambda *_: next(left))
    assert cores.busy() == least
    assert len(slept) == looks


def test_busy_is_the_load_where_the_kernel_tells_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cores.time, "sleep", lambda _: None)
    monkeypatch.setattr(CpuTime, "now", lambda: None)
    monkeypatch.setattr(cores.os, "getloadavg", lambda: (1.25, 0, 0))
    assert cores.busy() == 1.25
