"""Clients who send jobs and steer them while everything around them dies, and write down every answer they got."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from bench.chaos.plan import Errand

ENDS = ("succeeded", "failed", "cancelled")
AWAY = 503
POLL_S = 0.5
AGAIN_S = 0.3


@dataclass(frozen=True)
class Answer:
    """What one request was answered."""

    key: str
    verb: str
    code: int
    job: str
    status: str
    at: float


class Closed(Exception):
    """The storm is over before this errand was."""


class Refused(Exception):
    """A job of ours is not accepted: the storm itself is wrong."""


@dataclass
class Clients:
    """`at_once` errands are under way at any time, until there were enough; the last of them are seen to the end."""

    urls: Sequence[str]
    bodies: Mapping[str, Mapping[str, Any]]
    at_once: int
    answers: list[Answer] = field(default_factory=list)
    ended: dict[str, str] = field(default_factory=dict)
    """The end of each errand's job, by key."""
    errands: list[Errand] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self, errands: Iterator[Errand], enough: Callable[[int], bool]) -> None:
        """`enough` is told how many errands were begun so far."""

        def take() -> Errand | None:
            with self._lock:
                if self._closed.is_set() or enough(len(self.errands)):
                    return None
                self.errands.append(next(errands))
                return self.errands[-1]

        def work() -> None:
            try:
                with httpx.Client(timeout=20) as http:
                    while errand := take():
                        self._do(errand, http)
            except Closed:
                return
            except BaseException as error:
                self.failures.append(error)

        self._threads = [threading.Thread(target=work, name=f"client-{n}", daemon=True) for n in range(self.at_once)]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _do(self, errand: Errand, http: httpx.Client) -> None:
        job = self._send(errand)
        if errand.wish != "none":
            time.sleep(errand.patience_s)
            self._steer(errand, job, http)
        self.ended[errand.key] = self._until(errand, job, ENDS, http)

    def _send(self, errand: Errand) -> str:
        """The same job from several senders at once, each again and again until it is told that the job is there."""

        def send(_: int) -> str:
            with httpx.Client(timeout=20, headers={"Idempotency-Key": errand.key}) as http:
                while True:
                    answer = self._ask(errand, http, "POST", "/v1/jobs", "submit", self.bodies[errand.recipe])
                    if answer.status_code in (200, 201):
                        return str(answer.json()["id"])
                    if answer.is_client_error:
                        raise Refused(f"{errand.recipe}: {answer.text}")
                    time.sleep(AGAIN_S)

        with ThreadPoolExecutor(errand.senders) as senders:
            job, *_ = senders.map(send, range(errand.senders))
            return job

    def _steer(self, errand: Errand, job: str, http: httpx.Client) -> None:
        match errand.wish:
            case "cancel":
                self._wish(errand, job, "cancel", http)
            case "pause":
                self._wish(errand, job, "pause", http)
                if self._until(errand, job, ("paused", *ENDS), http) == "paused":
                    self._wish(errand, job, "resume", http)
            case "retry":
                self._wish(errand, job, "cancel", http)
                if self._until(errand, job, ENDS, http) == "cancelled":
                    self._wish(errand, job, "retry", http)

    def _wish(self, errand: Errand, job: str, verb: str, http: httpx.Client) -> None:
        """Until it is granted, or not lawful any more: it was granted unheard, or the job has ended."""
        while self._ask(errand, http, "POST", f"/v1/jobs/{job}/{verb}", verb).status_code not in (200, 409):
            time.sleep(AGAIN_S)

    def _until(self, errand: Errand, job: str, statuses: Sequence[str], http: httpx.Client) -> str:
        while True:
            answer = self._ask(errand, http, "GET", f"/v1/jobs/{job}", "look")
            if answer.status_code == 200 and (status := str(answer.json()["status"])) in statuses:
                return status
            time.sleep(POLL_S)

    def _ask(
        self, errand: Errand, http: httpx.Client, method: str, path: str, verb: str, body: Any = None
    ) -> httpx.Response:
        """One answer, from whichever server gives one. Looks that went well are not worth writing down."""
        while not self._closed.is_set():
            url = random.choice(self.urls)  # noqa: S311 - which one answers is chance anyway
            try:
                answer = http.request(method, url + path, json=body)
            except httpx.TransportError:
                time.sleep(AGAIN_S)
                continue
            if verb != "look" or answer.status_code != 200:
                said = answer.json() if answer.is_success else {}
                told = Answer(
                    errand.key, verb, answer.status_code, said.get("id", ""), said.get("status", ""), time.time()
                )
                self.answers.append(told)
            return answer
        raise Closed
