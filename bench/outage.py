"""PostgreSQL away for ten minutes, under a running job, a waiting one, and a client who goes on trying to submit.

    .venv/bin/python -m bench.outage [--minutes 10] [--frozen]

A cluster at the default timings with one worker. PostgreSQL is killed with SIGKILL, and started again on the same port
and data after so long; with --frozen all its processes are stopped, and woken. Checked from outside:

- a POST is answered 503 with Retry-After, in bounded time, throughout;
- the training went on: its log has epochs from all along the outage;
- afterwards all three jobs succeed without a person, each in its first attempt, and none of them is there twice.

Exit code 1 if one of them does not hold. Expect one and a half times `--minutes`, which is how long the running job
takes, and two minutes more: 17 minutes by default.
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from bench import engine_run
from bench.service import Parts, leave_in_order, parts
from client.sdk import Distillery

TINY = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 2, "seed": 1}}
BEFORE_S = 10
TRY_EVERY_S = 1
BOUND_S = 20
"""A POST's longest way to its answer: the API gives a frozen database 12 s."""
SILENCE_S = 30
"""Longer than any epoch here."""
BACK_S = 120
PATIENCE_S = 60
EPOCH = re.compile(r"^(\S+ \S+),\d+ student, epoch", re.MULTILINE)


@dataclass(frozen=True)
class Try:
    sent_at: float
    took_s: float
    status: int
    retry_after: str | None


@dataclass
class Submitter:
    """One job, sent again and again under one key until it is accepted, as a script would."""

    url: str
    tries: list[Try] = field(default_factory=list)
    job_id: str | None = None

    def run(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as http:
            while self.job_id is None:
                began, sent_at = time.monotonic(), time.time()
                answer = http.post(f"{self.url}/v1/jobs", json=TINY, headers={"Idempotency-Key": "one-and-the-same"})
                took_s, retry_after = time.monotonic() - began, answer.headers.get("retry-after")
                self.tries.append(Try(sent_at, took_s, answer.status_code, retry_after))
                if answer.is_success:
                    self.job_id = answer.json()["id"]
                else:
                    time.sleep(TRY_EVERY_S)


@dataclass(frozen=True)
class Outcome:
    """What was seen: times in seconds since the epoch, jobs and attempts as the API tells them."""

    began: float
    ended: float
    tries: Sequence[Try]
    log: str
    jobs: Sequence[Any]
    attempts: Sequence[Any]
    known: set[str]
    """Every job that is there at the end."""


def main() -> int:
    arguments = _arguments()
    leave_in_order()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seconds = 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="distillery-outage-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        spec = engine_run.lasting(1.5 * seconds + 4 * BEFORE_S, folder / "rehearsal")
        with parts(folder / "service", 1) as service, Distillery(service.url, retries=20) as client:
            outcome = _story(client, service, spec, seconds, arguments.frozen)
    held = [_tell(*check) for check in _checks(outcome)]
    return 0 if all(held) else 1


def _story(client: Distillery, service: Parts, spec: dict[str, Any], seconds: float, frozen: bool) -> Outcome:
    running = client.submit(spec)["id"]
    _until(lambda: client.job(running)["progress"], "the first step")
    waiting = client.submit(TINY)["id"]
    time.sleep(BEFORE_S)
    submitter = Submitter(service.url)
    began, ended = _outage(service, submitter, seconds, frozen)
    jobs = [client.wait(job_id) for job_id in (running, waiting, str(submitter.job_id))]
    return Outcome(
        began=began,
        ended=ended,
        tries=submitter.tries,
        log=next((service.files / "logs" / running).iterdir()).read_text(),
        jobs=jobs,
        attempts=[client.connection.json("GET", f"/v1/jobs/{job['id']}/attempts")["data"] for job in jobs],
        known={job["id"] for job in client.jobs()},
    )


def _outage(service: Parts, submitter: Submitter, seconds: float, frozen: bool) -> tuple[float, float]:
    """When PostgreSQL went, and when it was there again. The submitter's job is accepted soon after."""
    go, come = (
        (service.database.freeze, service.database.wake)
        if frozen
        else (lambda: service.database.kill(seconds), service.database.look_after)
    )
    go()
    began = time.time()
    print(f"PostgreSQL is {'frozen' if frozen else 'killed'}, for {seconds:g} s", flush=True)
    sending = threading.Thread(target=submitter.run, daemon=True)
    sending.start()
    time.sleep(seconds + 1)
    ended = time.time()
    come()
    sending.join(BACK_S)
    if submitter.job_id is None:
        raise SystemExit(f"no POST was accepted within {BACK_S} s of PostgreSQL's return; answers: {submitter.tries}")
    return began, ended


def _checks(outcome: Outcome) -> Iterator[tuple[bool, str, str]]:
    """Whether it holds, what was promised, and what was seen."""
    tries = [one for one in outcome.tries if one.sent_at + one.took_s < outcome.ended]
    took = [one.took_s for one in tries] or [float("inf")]
    seen = f"{len(tries)} tries, median {statistics.median(took):.2f} s, longest {max(took):.2f} s"
    refused = bool(tries) and all(one.status == 503 and one.retry_after for one in tries)
    yield refused, "every POST was answered 503 with Retry-After", seen
    yield max(took) < BOUND_S, f"within {BOUND_S} s", seen
    epochs = [at for at in _epochs(outcome.log) if outcome.began < at < outcome.ended]
    silence = max(later - at for at, later in pairwise([outcome.began, *epochs, outcome.ended]))
    yield silence < SILENCE_S, "the training went on", f"{len(epochs)} epochs, longest silence {silence:.0f} s"
    finished = _seconds(outcome.jobs[0]["finished_at"]) - outcome.ended
    yield finished > 0, "the running job outlasted the outage", f"it ended {finished:.0f} s after it"
    statuses = [job["status"] for job in outcome.jobs]
    yield statuses == ["succeeded"] * 3, "all three jobs succeeded", ", ".join(statuses)
    attempts = [len(tried) for tried in outcome.attempts]
    yield attempts == [1, 1, 1], "each in its first attempt", f"attempts {attempts}"
    yield outcome.known == {job["id"] for job in outcome.jobs}, "none is there twice", f"{len(outcome.known)} jobs"


def _epochs(log: str) -> list[float]:
    return [datetime.fromisoformat(stamp).timestamp() for stamp in EPOCH.findall(log)]


def _seconds(at: str | None) -> float:
    return datetime.fromisoformat(at).timestamp() if at else 0.0


def _tell(holds: bool, promised: str, seen: str) -> bool:
    print(f"{'yes' if holds else 'NO'}: {promised} ({seen})", flush=True)
    return holds


def _until(come_true: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not come_true():
        if time.monotonic() > end:
            raise SystemExit(f"waited {PATIENCE_S} s in vain for {what}")
        time.sleep(0.1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="PostgreSQL away under a running job, a waiting one and a client.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--frozen", action="store_true", help="stopped (SIGSTOP) and woken, not killed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
