"""How long a client waits: for a claim, an engine, a first step; and for work to go on after a worker was killed.

    .venv/bin/python -m bench.latency [--posts 60] [--kills 5] [--only posts kills]

Posts: tiny jobs to a free worker, one after the other, on the embedded default and on a cluster, each with engines that
wait warm and with engines started on the claim (DISTILLERY_WARM=false); the four take turns. Kills: a cluster at the
default timings (lease 30 s), the worker of a running job killed with SIGKILL, again and again; either it stays away and
another host's takes the job over when the lease has lapsed, or it is started again at once and finds that the training
is dead by its lock. Everything is seen as a client sees it: events' times and answers of the API.

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
from typing import Any

from bench.processes import Program, below, command_line
from bench.service import SETTINGS, Parts, await_workers, leave_in_order, parts
from client.sdk import Distillery

TINY = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 1, "seed": 0}}
LONG = {
    "dataset": "digits",
    "student": "convnet16",
    "method": "supervised",
    "training": {"epochs": 100_000, "seed": 0, "checkpoint_every_s": 1},
}
LEASE_S = 30
LOOK_S = 0.01
STILL_S = 0.5
PATIENCE_S = 300
AIMS = {"POST to claimed, p99": 0.05, "POST to engine, warm, median": 0.3, "kill to work, by lease, max": 35}


@dataclass(frozen=True)
class Waits:
    """Seconds since the moment before the POST was sent."""

    claimed: float
    engine: float
    """Its first line, which tells a phase."""
    step: float
    """As the first progress is read, by a client that asks every hundredth of a second."""


def main() -> int:
    arguments = _arguments()
    leave_in_order()
    # One thread for every engine: on few cores more would measure each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="distillery-latency-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        if "posts" in arguments.only:
            _print_posts(_posts(folder, arguments.posts))
        if "kills" in arguments.only:
            _print_kills(_kills(folder, arguments.kills))
    print("\naims:", "; ".join(f"{what} {_told(aim)}" for what, aim in AIMS.items()))
    return 0


# ── posts ──


def _posts(folder: Path, posts: int) -> dict[tuple[str, str], list[Waits]]:
    """By setting and engine."""
    with ExitStack() as running:
        services = {}
        for setting, start in SETTINGS.items():
            for engine, warm in (("warm", "true"), ("cold", "false")):
                home = folder / f"{setting}-{engine}"
                home.mkdir()
                address = running.enter_context(start(home, DISTILLERY_WARM=warm, DISTILLERY_THREADS="1"))
                await_workers(address, 1)
                services[setting, engine] = running.enter_context(Distillery(address))
        for service in services.values():
            _wait_for_a_job(service)  # The first decodes the data set for all that follow.
        found: dict[tuple[str, str], list[Waits]] = {which: [] for which in services}
        for number in range(1, posts + 1):
            for which, service in services.items():
                found[which].append(_wait_for_a_job(service))
            _say(f"post {number} of {posts}")
    return found


def _wait_for_a_job(service: Distillery) -> Waits:
    """Begun once every engine waits that there is going to be."""
    _until(_engines_are_still(), "every engine to have imported what it waits for")
    sent = time.time()
    job_id = service.submit(TINY)["id"]
    _until(lambda: _step(service, job_id), "the first step")
    step = time.time()
    job = service.wait(job_id, timeout_s=PATIENCE_S, poll_s=0.05)
    if job["status"] != "succeeded":
        raise SystemExit(f"job {job_id} ended {job['status']}: {job['error']}")
    at: dict[str, float] = {}
    for event in service.events(job_id):
        at.setdefault(event["type"], datetime.fromisoformat(event["at"]).timestamp())
    return Waits(at["claimed"] - sent, at["phase"] - sent, step - sent)


def _engines_are_still() -> Callable[[], bool]:
    """Whether no engine has used the processor for a while, nor come or gone."""
    seen, since = _engines(), time.monotonic()

    def are_still() -> bool:
        nonlocal seen, since
        now = _engines()
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > STILL_S

    return are_still


def _engines() -> dict[int, float]:
    """Seconds of processor time by process."""
    return dict(_seconds_used(pid for pid in below(os.getpid()) if "kdcore" in command_line(pid)))


def _seconds_used(pids: Iterator[int]) -> Iterator[tuple[int, float]]:
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        yield pid, (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _print_posts(found: dict[tuple[str, str], list[Waits]]) -> None:
    print("\n| setting | engine | POST to claimed: p50, p90, p99 | to the engine's first line | to the first step |")
    print("|---|---|---|---|---|")
    for (setting, engine), waits in found.items():
        columns = ([getattr(wait, name) for wait in waits] for name in ("claimed", "engine", "step"))
        cells = (", ".join(_told(_percentile(column, share)) for share in (0.5, 0.9, 0.99)) for column in columns)
        print(f"| {setting} | {engine} | {' | '.join(cells)} |")
    for setting in SETTINGS:
        cold, warm = (statistics.median(wait.step for wait in found[setting, engine]) for engine in ("cold", "warm"))
        print(f"{setting}: a first step comes {cold / warm:.1f} times sooner from an engine that waited")


# ── kills ──


def _kills(folder: Path, kills: int) -> dict[str, list[float]]:
    """Seconds from SIGKILL to the next step that is told, by what became of the worker."""
    found: dict[str, list[float]] = {"stays away, by lease": [], "starts again, by lock": []}
    with parts(folder / "two-workers", 2) as service, Distillery(service.url) as client:
        time.sleep(LEASE_S)  # Nobody takes over anything before a lease of unbroken contact.
        for number in range(1, kills + 1):
            found["stays away, by lease"].append(_work_goes_on(client, service, again=False))
            _say(f"kill {number} of {kills}, by lease: {_told(found['stays away, by lease'][-1])}")
    with parts(folder / "one-worker", 1) as service, Distillery(service.url) as client:
        for number in range(1, kills + 1):
            found["starts again, by lock"].append(_work_goes_on(client, service, again=True))
            _say(f"kill {number} of {kills}, by lock: {_told(found['starts again, by lock'][-1])}")
    return found


def _work_goes_on(client: Distillery, service: Parts, again: bool) -> float:
    """`again`: the killed worker is started again at once; else only after somebody else has gone on."""
    job_id = client.submit(LONG)["id"]
    _until(lambda: client.job(job_id)["checkpoint_step"], "the first checkpoint")
    worker = _worker_of(client, service, job_id)
    began = time.monotonic()
    worker.kill()
    if again:
        worker.start()
    reached = client.job(job_id)["progress"]
    _until(lambda: client.job(job_id)["progress"] != reached, "work to go on")
    took = time.monotonic() - began
    client.cancel(job_id)
    client.wait(job_id, timeout_s=PATIENCE_S)
    if not worker.alive:
        worker.start()
    _until(_engines_are_still(), "the worker to be ready again")
    return took


def _worker_of(client: Distillery, service: Parts, job_id: str) -> Program:
    """A worker's name is its host, its process id and a random word."""
    attempts: list[dict[str, Any]] = client.connection.json("GET", f"/v1/jobs/{job_id}/attempts")["data"]
    owner = next(attempt["worker"] for attempt in attempts if attempt["ended_at"] is None)
    return next(worker for worker in service.workers if owner.split("-")[-2] == str(worker.pid))


def _print_kills(found: dict[str, list[float]]) -> None:
    print("\n| the killed worker | kills | kill to work going on: median | max |\n|---|---|---|---|")
    for what, seconds in found.items():
        print(f"| {what} | {len(seconds)} | {_told(statistics.median(seconds))} | {_told(max(seconds))} |")


# ── both ──


def _step(service: Distillery, job_id: str) -> int:
    progress = service.job(job_id)["progress"]
    return int(progress["step"]) if progress else 0


def _until(come_true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not come_true():
        if time.monotonic() > end:
            raise SystemExit(f"waited {PATIENCE_S} s in vain for {what}")
        time.sleep(LOOK_S)


def _percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank: a value that was measured."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def _told(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How long a client waits for work to begin, and to go on.")
    parser.add_argument("--posts", type=int, default=60, help="to each of the four services")
    parser.add_argument("--kills", type=int, default=5, help="of each kind")
    parser.add_argument("--only", nargs="+", default=["posts", "kills"], choices=["posts", "kills"])
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
