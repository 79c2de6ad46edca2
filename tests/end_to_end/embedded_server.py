"""The embedded server as a process of its own, and the REST requests of the end-to-end tests."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from base.jobs import TERMINAL
from bench.processes import Program
from tests.worker.processes import pause_s

JOB_S = 120


class EmbeddedServer(Program):
    """`python -m serve` on a home folder; it can be killed and started again."""

    def __init__(self, home: Path, before: Sequence[str] = (), **environment: str) -> None:
        self.home = home
        self.http = httpx.Client(timeout=60)
        self._ready_file = home.with_suffix(".ready")
        command = ["serve", "--port", "0", "--home", str(home), "--ready-file", str(self._ready_file)]
        super().__init__("server", command, home.with_suffix(".log"), {"OMP_NUM_THREADS": "1", **environment}, before)

    def start(self) -> None:
        self._ready_file.unlink(missing_ok=True)
        super().start()
        self.http.base_url = httpx.URL(self.wait_for_url(self._ready_file))

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        return super().stop(number)

    def get(self, path: str, **query: Any) -> Any:
        answer = self.http.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def registered(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Register a file (`kind`: models or datasets), and return the row when it has been inspected."""
        answer = self.post(f"/v1/{kind}", body)
        assert answer.status_code in (201, 202), answer.text
        path = answer.headers["location"]
        self.wait_until(lambda: self.get(path)["state"] != "inspecting", JOB_S)
        row: dict[str, Any] = self.get(path)
        return row

    def refusal(self, kind: str, body: dict[str, Any]) -> str:
        """Register a file that must be refused: at once or, if the inspection takes longer, in its row. Returns why."""
        answer = self.post(f"/v1/{kind}", body)
        if answer.status_code == httpx.codes.ACCEPTED:
            path = answer.headers["location"]
            self.wait_until(lambda: self.get(path)["state"] != "inspecting", JOB_S)
            row = self.get(path)
            assert row["state"] == "refused"
            self.http.delete(path)
            return str(row["error"])
        assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY, answer.text
        return answer.text

    def submit(self, body: dict[str, Any]) -> str:
        """Submit a job and return its id."""
        answer = self.post("/v1/jobs", body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def upload(self, path: Path) -> str:
        """Upload a file and return its blob reference."""
        with path.open("rb") as file:
            answer = self.http.post("/v1/uploads", params={"filename": path.name}, content=file)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["blob"])

    def ended(self, job_id: str, status: str = "succeeded") -> dict[str, Any]:
        """Wait for the end of a job and return the job."""
        self.wait_until(lambda: self.get(f"/v1/jobs/{job_id}")["status"] in TERMINAL, JOB_S)
        job: dict[str, Any] = self.get(f"/v1/jobs/{job_id}")
        assert job["status"] == status, (job["error"], self.log_tail)
        return job

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for a condition; a failure shows the end of the server's log."""
        began = time.monotonic()
        while not condition():
            waited = time.monotonic() - began
            assert waited < timeout_s, f"waited {timeout_s} s\n{self.log_tail}"
            time.sleep(pause_s(waited))


@contextlib.contextmanager
def embedded_server(home: Path, before: Sequence[str] = (), **environment: str) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(home, before, **environment)
    try:
        yield server
    finally:
        server.http.close()
        if server.alive:
            server.stop()
