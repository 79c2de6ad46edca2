"""PostgreSQL away for ten minutes, with a running job, a waiting job, and a client that continues to submit.

    .venv/bin/python -m bench.outage [--minutes 10] [--frozen]

A cluster with the default timings and one worker. PostgreSQL is killed with SIGKILL, and started again after the given
time on the same port and data; with --frozen all its processes are stopped with SIGSTOP, then continued. Checks, all
from outside:

- during the outage every POST is answered 503 with Retry-After, in bounded time;
- the training continues: its log has epochs from the whole outage;
- afterwards all three jobs succeed without a person, each in its first attempt, and no job exists twice.

Exit code 1 if a check fails. Takes one and a half times `--minutes`, which is the length of the running job, and two
minutes more: 17 minutes by default.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from bench.engine_run import spec_lasting
from bench.processes import exit_on_sigterm, wait_until
from bench.service import KillableCluster, killable_cluster, open_folder
from client.sdk import Distillery

TINY = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 2, "seed": 1}}
BEFORE_S = 10
POST_EVERY_S = 1
MAX_ANSWER_S = 20
"""The longest time for an answer to a POST: the API waits 12 s for a frozen database."""
MAX_GAP_S = 30
"""Longer than any epoch of this training."""
RETURN_S = 120
FIRST_STEP_S = 60
EPOCH = re.compile(r"^(\S+ \S+),\d+ student, epoch", re.MULTILINE)


@dataclass(frozen=True)
class Post:
    sent_at: float
    seconds: float
    status: int
    retry_after: str | None


@dataclass
class Submitter:
    """A client that sends one job again and again under one idempotency key, until it is accepted."""

    url: str
    posts: list[Post] = field(default_factory=list)
    job_id: str | None = None

    def run(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while self.job_id is None:
                began, sent_at = time.monotonic(), time.time()
                answer = http.post(f"{self.url}/v1/jobs", json=TINY, headers={"Idempotency-Key": "one-and-the-same"})
                seconds, retry_after = time.monotonic() - began, answer.headers.get("retry-after")
                self.posts.append(Post(sent_at, seconds, answer.status_code, retry_after))
                if answer.is_success:
                    self.job_id = answer.json()["id"]
                else:
                    time.sleep(POST_EVERY_S)


@dataclass(frozen=True)
class OutageResult:
    """Everything that the checks read. Times are seconds since the epoch."""

    began: float
    ended: float
    posts: Sequence[Post]
    log: str
    jobs: Sequence[Any]
    """The running job, the waiting job, and the job of the submitter."""
    attempts: Sequence[Sequence[Any]]
    """The attempts of each of these jobs."""
    all_jobs: set[str]
    """Every job in the database at the end."""


def main() -> int:
    arguments = _arguments()
    exit_on_sigterm()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seconds = 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="distillery-outage-") as name:
        folder = Path(name)
        open_folder(folder)
        spec = spec_lasting(1.5 * seconds + 4 * BEFORE_S, folder / "rehearsal")
        with killable_cluster(folder / "service", 1) as service, Distillery(service.url, retries=20) as client:
            result = _run(client, service, spec, seconds, arguments.frozen)
    all_passed = True
    for passed, check, details in _checks(result):
        print(f"{'yes' if passed else 'NO'}: {check} ({details})", flush=True)
        all_passed = all_passed and passed
    return 0 if all_passed else 1


def _run(
    client: Distillery, service: KillableCluster, spec: dict[str, Any], seconds: float, frozen: bool
) -> OutageResult:
    running = client.submit(spec)["id"]
    wait_until(lambda: client.job(running)["progress"], "the first step", FIRST_STEP_S)
    waiting = client.submit(TINY)["id"]
    time.sleep(BEFORE_S)
    submitter = Submitter(service.url)
    began, ended = _outage(service, submitter, seconds, frozen)
    jobs = [client.wait(job_id) for job_id in (running, waiting, str(submitter.job_id))]
    return OutageResult(
        began=began,
        ended=ended,
        posts=submitter.posts,
        log=next((service.files / "logs" / running).iterdir()).read_text(),
        jobs=jobs,
        attempts=[client.attempts(job["id"]) for job in jobs],
        all_jobs={job["id"] for job in client.jobs()},
    )


def _outage(service: KillableCluster, submitter: Submitter, seconds: float, frozen: bool) -> tuple[float, float]:
    """Make the outage and wait until the submitter's job is accepted. Returns the outage's begin and end."""
    if frozen:
        service.database.freeze()
    else:
        service.database.kill(restart_after_s=seconds)
    began = time.time()
    print(f"PostgreSQL is {'frozen' if frozen else 'killed'}, for {seconds:g} s", flush=True)
    submitting = threading.Thread(target=submitter.run, daemon=True)
    submitting.start()
    time.sleep(seconds + 1)
    ended = time.time()
    if frozen:
        service.database.unfreeze()
    else:
        service.database.restart_if_due()
    submitting.join(RETURN_S)
    if submitter.job_id is None:
        raise SystemExit(f"no POST was accepted {RETURN_S} s after PostgreSQL's return; answers: {submitter.posts}")
    return began, ended


def _checks(result: OutageResult) -> Iterator[tuple[bool, str, str]]:
    """Yield for each check: passed or not, its text, and the figures behind it."""
    posts = [post for post in result.posts if post.sent_at + post.seconds < result.ended]
    seconds = [post.seconds for post in posts] or [float("inf")]
    details = f"{len(posts)} POSTs, median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s"
    all_503 = bool(posts) and all(post.status == 503 and post.retry_after for post in posts)
    yield all_503, "every POST was answered 503 with Retry-After", details
    yield max(seconds) < MAX_ANSWER_S, f"within {MAX_ANSWER_S} s", details
    epochs = [at for at in _epochs(result.log) if result.began < at < result.ended]
    gap = max(later - at for at, later in pairwise([result.began, *epochs, result.ended]))
    yield gap < MAX_GAP_S, "the training continued", f"{len(epochs)} epochs, longest gap {gap:.0f} s"
    finished = _timestamp(result.jobs[0]["finished_at"]) - result.ended
    yield finished > 0, "the running job was longer than the outage", f"it ended {finished:.0f} s after it"
    statuses = [job["status"] for job in result.jobs]
    yield statuses == ["succeeded"] * 3, "all three jobs succeeded", ", ".join(statuses)
    counts = [len(attempts) for attempts in result.attempts]
    yield counts == [1, 1, 1], "each in its first attempt", f"attempts {counts}"
    yield result.all_jobs == {job["id"] for job in result.jobs}, "no job exists twice", f"{len(result.all_jobs)} jobs"


def _epochs(log: str) -> list[float]:
    return [datetime.fromisoformat(stamp).timestamp() for stamp in EPOCH.findall(log)]


def _timestamp(at: str | None) -> float:
    return datetime.fromisoformat(at).timestamp() if at else 0.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="PostgreSQL away, with a running job, a waiting job and a client that continues to submit."
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--frozen", action="store_true", help="freeze PostgreSQL (SIGSTOP) in place of a kill")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
