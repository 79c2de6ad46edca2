"""Clients that send jobs, cancel, pause and retry them while faults are injected, and record every answer."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from base.jobs import TERMINAL
from bench.chaos.plan import PlannedJob

POLL_S = 0.5
RETRY_S = 0.3


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    key: str
    verb: str
    code: int
    job: str
    status: str
    at: float


class ClientsClosed(Exception):
    """The run ended before this job did."""


class SubmitRefused(Exception):
    """The service does not accept a job of the plan: the plan is wrong."""


@dataclass
class Clients:
    """Keep `concurrent` jobs under way until `enough`; the last ones are followed to their end."""

    urls: Sequence[str]
    bodies: Mapping[str, Mapping[str, Any]]
    concurrent: int
    answers: list[Answer] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)
    """The final status of each job, by key."""
    jobs: list[PlannedJob] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self, jobs: Iterator[PlannedJob], enough: Callable[[int], bool]) -> None:
        """Start the clients. `enough` gets the number of jobs begun so far."""

        def next_job() -> PlannedJob | None:
            with self._lock:
                if self._closed.is_set() or enough(len(self.jobs)):
                    return None
                self.jobs.append(next(jobs))
                return self.jobs[-1]

        def work() -> None:
            try:
                with httpx.Client(timeout=20) as http:
                    while job := next_job():
                        self._follow(job, http)
            except ClientsClosed:
                return
            except BaseException as error:
                self.failures.append(error)

        self._threads = [threading.Thread(target=work, name=f"client-{n}", daemon=True) for n in range(self.concurrent)]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _follow(self, job: PlannedJob, http: httpx.Client) -> None:
        """Submit a job, act on it, and wait for its end."""
        job_id = self._submit(job)
        if job.action != "none":
            time.sleep(job.action_after_s)
            self._act(job, job_id, http)
        self.ended[job.key] = self._wait_for(TERMINAL, job, job_id, http)

    def _submit(self, job: PlannedJob) -> str:
        """Send the job from several senders at once, each until its request is accepted. Returns the job's id."""

        def send(_: int) -> str:
            with httpx.Client(timeout=20, headers={"Idempotency-Key": job.key}) as http:
                while True:
                    answer = self._request(job, http, "POST", "/v1/jobs", "submit", self.bodies[job.recipe])
                    if answer.status_code in (200, 201):
                        return str(answer.json()["id"])
                    if answer.is_client_error:
                        raise SubmitRefused(f"{job.recipe}: {answer.text}")
                    time.sleep(RETRY_S)

        with ThreadPoolExecutor(job.senders) as senders:
            job_id, *_ = senders.map(send, range(job.senders))
            return job_id

    def _act(self, job: PlannedJob, job_id: str, http: httpx.Client) -> None:
        match job.action:
            case "cancel":
                self._post_action("cancel", job, job_id, http)
            case "pause":
                self._post_action("pause", job, job_id, http)
                if self._wait_for(("paused", *TERMINAL), job, job_id, http) == "paused":
                    self._post_action("resume", job, job_id, http)
            case "retry":
                self._post_action("cancel", job, job_id, http)
                if self._wait_for(TERMINAL, job, job_id, http) == "cancelled":
                    self._post_action("retry", job, job_id, http)

    def _post_action(self, verb: str, job: PlannedJob, job_id: str, http: httpx.Client) -> None:
        """Send an action until it is accepted, or not allowed any more.

        It is not allowed if the job has ended, or if an earlier request was accepted and its answer was lost.
        """
        while self._request(job, http, "POST", f"/v1/jobs/{job_id}/{verb}", verb).status_code not in (200, 409):
            time.sleep(RETRY_S)

    def _wait_for(self, statuses: Sequence[str], job: PlannedJob, job_id: str, http: httpx.Client) -> str:
        while True:
            answer = self._request(job, http, "GET", f"/v1/jobs/{job_id}", "poll")
            if answer.status_code == 200 and (status := str(answer.json()["status"])) in statuses:
                return status
            time.sleep(POLL_S)

    def _request(
        self, job: PlannedJob, http: httpx.Client, method: str, path: str, verb: str, body: Any = None
    ) -> httpx.Response:
        """Send a request to random servers until one answers. Successful polls are not recorded."""
        while not self._closed.is_set():
            url = random.choice(self.urls)  # noqa: S311 - the server is not part of the plan
            try:
                answer = http.request(method, url + path, json=body)
            except httpx.TransportError:
                time.sleep(RETRY_S)
                continue
            if verb != "poll" or answer.status_code != 200:
                view = answer.json() if answer.is_success else {}
                code, job_id, status = answer.status_code, view.get("id", ""), view.get("status", "")
                self.answers.append(Answer(job.key, verb, code, job_id, status, time.time()))
            return answer
        raise ClientsClosed
