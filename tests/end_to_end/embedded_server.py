"""The embedded service as a process of its own, and what a story needs of it over REST."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
START_S = 40
JOB_S = 120


class Service:
    """`python -m serve` on a home folder; may be killed and started again."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(timeout=60)

    def start(self) -> None:
        ready = self.home.with_suffix(".ready")
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "serve", "--port", "0", "--home", str(self.home), "--ready-file", str(ready)]
        with self.home.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        wait_until(ready.exists, START_S, self.log)
        self.http.base_url = httpx.URL(json.loads(ready.read_text())["url"])

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def log(self) -> str:
        return self.home.with_suffix(".log").read_text()[-3000:]

    def get(self, path: str, **query: Any) -> Any:
        answer = self.http.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def submit(self, body: dict[str, Any]) -> str:
        answer = self.post("/v1/jobs", body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def upload(self, path: Path) -> str:
        with path.open("rb") as file:
            answer = self.http.post("/v1/uploads", params={"filename": path.name}, content=file)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["blob"])

    def ended(self, job_id: str, status: str = "succeeded") -> dict[str, Any]:
        ends = ("succeeded", "failed", "cancelled")
        wait_until(lambda: self.get(f"/v1/jobs/{job_id}")["status"] in ends, JOB_S, self.log)
        job: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
        assert job["status"] == status, (job["error"], self.log())
        return job


@contextlib.contextmanager
def service(home: Path, **environment: str) -> Iterator[Service]:
    one = Service(home, **environment)
    one.start()
    try:
        yield one
    finally:
        one.http.close()
        if one.process is not None and one.process.poll() is None:
            one.stop()


def wait_until(condition: Callable[[], bool], limit_s: float, tell: Callable[[], str] = str) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s} s\n{tell()}"
        time.sleep(0.05)
