"""The waiting times of a client: for a claim, an engine, a first step, and for progress after a worker was killed.

    .venv/bin/python -m bench.latency [--posts 60] [--kills 5] [--only posts kills]

Posts: tiny jobs to a free worker, one after the other, on the embedded default and on a cluster, each with engines that
wait warm and with engines started on the claim (DISTILLERY_WARM=false); the four take turns. Kills: a cluster with the
default timings (lease 30 s); the worker of a running job is killed with SIGKILL, several times. Either it is not
started again, and another worker takes the job over when the lease has expired; or it is started again at once, and
sees by the lock that the training has ended. All times are those that a client sees: times of events and answers of the
API.

About 10 minutes for 60 posts to each of the four, and 40 s a kill.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from bench.processes import Program, command_line, descendants, exit_on_sigterm, wait_until
from bench.service import SETTINGS, KillableCluster, await_workers, killable_cluster, open_folder
from client.sdk import Distillery

TINY = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 1, "seed": 0}}
LONG = {
    "dataset": "digits",
    "student": "convnet16",
    "method": "supervised",
    "training": {"epochs": 100_000, "seed": 0, "checkpoint_every_s": 1},
}
LEASE_S = 30
POLL_S = 0.01
IDLE_S = 0.5
TIMEOUT_S = 300
NOT_RESTARTED, RESTARTED = "not restarted, by lease", "restarted, by lock"
AIMS = {"POST to claimed, p99": 0.05, "POST to engine, warm, median": 0.3, "kill to work, by lease, max": 35}

T = TypeVar("T")


@dataclass(frozen=True)
class JobTimes:
    """Seconds since the moment before the POST was sent."""

    claimed: float
    engine: float
    """The first line of the engine, which names a phase."""
    step: float
    """The first progress that a client reads; it polls 100 times a second."""


def main() -> int:
    arguments = _arguments()
    exit_on_sigterm()
    # One thread for every engine: with few cores, more threads would slow each other down.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="distillery-latency-") as name:
        folder = Path(name)
        open_folder(folder)
        if "posts" in arguments.only:
            _print_posts(_posts(folder, arguments.posts))
        if "kills" in arguments.only:
            _print_kills(_kills(folder, arguments.kills))
    print("\naims:", "; ".join(f"{name} {_duration(aim)}" for name, aim in AIMS.items()))
    return 0


# ── posts ──


def _posts(folder: Path, posts: int) -> dict[tuple[str, str], list[JobTimes]]:
    """Times of all jobs, by setting and engine."""
    with ExitStack() as running:
        services = {}
        for setting, start in SETTINGS.items():
            for engine, warm in (("warm", "true"), ("cold", "false")):
                home = folder / f"{setting}-{engine}"
                home.mkdir()
                url = running.enter_context(start(home, DISTILLERY_WARM=warm, DISTILLERY_THREADS="1"))
                await_workers(url, 1)
                services[setting, engine] = running.enter_context(Distillery(url))
        for service in services.values():
            _time_a_job(service)  # The first job decodes the data set for all others.
        times: dict[tuple[str, str], list[JobTimes]] = {which: [] for which in services}
        for number in range(1, posts + 1):
            for which, service in services.items():
                times[which].append(_time_a_job(service))
            _log(f"post {number} of {posts}")
    return times


def _time_a_job(service: Distillery) -> JobTimes:
    _wait(_engines_are_idle(), "all warm engines to finish their imports")
    sent = time.time()
    job_id = service.submit(TINY)["id"]
    _wait(lambda: _step(service, job_id), "the first step")
    step = time.time()
    job = service.wait(job_id, timeout_s=TIMEOUT_S, poll_s=0.05)
    if job["status"] != "succeeded":
        raise SystemExit(f"job {job_id} ended {job['status']}: {job['error']}")
    at: dict[str, float] = {}
    for event in service.events(job_id):
        at.setdefault(event["type"], datetime.fromisoformat(event["at"]).timestamp())
    return JobTimes(at["claimed"] - sent, at["phase"] - sent, step - sent)


def _engines_are_idle() -> Callable[[], bool]:
    """A condition: for IDLE_S no engine has used the processor, started or ended."""
    last, since = _engines(), time.monotonic()

    def are_idle() -> bool:
        nonlocal last, since
        now = _engines()
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > IDLE_S

    return are_idle


def _engines() -> dict[int, float]:
    """Seconds of processor time by process."""
    return dict(_seconds_used(pid for pid in descendants(os.getpid()) if "kdcore" in command_line(pid)))


def _seconds_used(pids: Iterator[int]) -> Iterator[tuple[int, float]]:
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        yield pid, (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _print_posts(times: dict[tuple[str, str], list[JobTimes]]) -> None:
    print("\n| setting | engine | POST to claimed: p50, p90, p99 | to the engine's first line | to the first step |")
    print("|---|---|---|---|---|")
    for (setting, engine), jobs in times.items():
        columns = ([getattr(job, name) for job in jobs] for name in ("claimed", "engine", "step"))
        cells = (", ".join(_duration(_percentile(column, share)) for share in (0.5, 0.9, 0.99)) for column in columns)
        print(f"| {setting} | {engine} | {' | '.join(cells)} |")
    for setting in SETTINGS:
        cold, warm = (statistics.median(job.step for job in times[setting, engine]) for engine in ("cold", "warm"))
        print(f"{setting}: the first step comes {cold / warm:.1f} times sooner from a warm engine")


# ── kills ──


def _kills(folder: Path, kills: int) -> dict[str, list[float]]:
    """Seconds from each SIGKILL to the next step that the API reports."""
    seconds: dict[str, list[float]] = {NOT_RESTARTED: [], RESTARTED: []}
    for kind, workers in ((NOT_RESTARTED, 2), (RESTARTED, 1)):
        with killable_cluster(folder / f"{workers}-workers", workers) as service, Distillery(service.url) as client:
            if kind == NOT_RESTARTED:
                time.sleep(LEASE_S)  # A new worker takes no job over before it has had contact for a whole lease.
            for number in range(1, kills + 1):
                seconds[kind].append(_recovery_time(client, service, restart=kind == RESTARTED))
                _log(f"kill {number} of {kills}, {kind}: {_duration(seconds[kind][-1])}")
    return seconds


def _recovery_time(client: Distillery, service: KillableCluster, restart: bool) -> float:
    """Seconds from the kill to new progress. `restart`: start the killed worker at once, else after the measurement."""
    job_id = client.submit(LONG)["id"]
    _wait(lambda: client.job(job_id)["checkpoint_step"], "the first checkpoint")
    worker = _worker_of(client, service, job_id)
    began = time.monotonic()
    worker.kill()
    if restart:
        worker.start()
    reached = client.job(job_id)["progress"]
    _wait(lambda: client.job(job_id)["progress"] != reached, "the work to continue")
    seconds = time.monotonic() - began
    client.cancel(job_id)
    client.wait(job_id, timeout_s=TIMEOUT_S)
    if not worker.alive:
        worker.start()
    _wait(_engines_are_idle(), "the worker to be ready again")
    return seconds


def _worker_of(client: Distillery, service: KillableCluster, job_id: str) -> Program:
    """The worker that runs a job. A worker's name is its host, its process id and a random word."""
    owner = next(attempt["worker"] for attempt in client.attempts(job_id) if attempt["ended_at"] is None)
    return next(worker for worker in service.workers if owner.split("-")[-2] == str(worker.pid))


def _print_kills(times: dict[str, list[float]]) -> None:
    print("\n| the killed worker | kills | kill to continued work: median | max |\n|---|---|---|---|")
    for kind, seconds in times.items():
        print(f"| {kind} | {len(seconds)} | {_duration(statistics.median(seconds))} | {_duration(max(seconds))} |")


# ── both ──


def _step(service: Distillery, job_id: str) -> int:
    progress = service.job(job_id)["progress"]
    return int(progress["step"]) if progress else 0


def _wait(condition: Callable[[], T], what: str) -> T:
    return wait_until(condition, what, TIMEOUT_S, POLL_S)


def _percentile(values: Sequence[float], share: float) -> float:
    """The percentile by nearest rank, which is one of the values."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How long a client waits for work to begin and to continue.")
    parser.add_argument("--posts", type=int, default=60, help="to each of the four services")
    parser.add_argument("--kills", type=int, default=5, help="of each kind")
    parser.add_argument("--only", nargs="+", default=["posts", "kills"], choices=["posts", "kills"])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
