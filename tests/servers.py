"""The REST server, the database and the broker as processes that a test may kill, freeze and start again."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI

from api.app import SERVER_OPTIONS
from local import servers
from store.settings import Settings
from tests.worker.job_database import REPOSITORY
from tests.worker.processes import until

START_S = 60.0
"""Time limit of a server's imports on a busy machine."""
SPEC = {"dataset": "digits", "student": "convnet8", "method": "supervised", "training": {"epochs": 1}}
STEPS = 10
"""The steps that the fake engine trains for a job that was posted."""


class Api:
    """`python -m api` on a port of its own."""

    def __init__(self, settings: Settings, log: Path, failpoints: str = "") -> None:
        variables = {f"DISTILLERY_{name.upper()}": str(v) for name, v in settings.model_dump(exclude_none=True).items()}
        variables |= {"DISTILLERY_PORT": "0", "DISTILLERY_FAILPOINTS": failpoints}
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api"],
                env={**os.environ, **variables},
                cwd=REPOSITORY,
                stdout=output,
                stderr=output,
            )
        self.http = httpx.Client(base_url=self._address(), timeout=60)
        # Of several processes the first one logs the address before the others listen.
        try:
            until(self._answers, "the server to answer", START_S)
        except AssertionError:
            self.stop()
            raise

    @property
    def log(self) -> str:
        return self._log.read_text()

    def post(self, key: str | None = None, **changes: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.http.post("/v1/jobs", json={**SPEC, **changes}, headers=headers)

    def submit(self) -> str:
        """Post a job, which must be accepted; returns its id."""
        response = self.post()
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.http.close()
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def _answers(self) -> bool:
        try:
            return self.http.get("/healthz").status_code == 200
        except httpx.ConnectError:
            return False

    def _address(self) -> str:
        def address() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log
            return re.search(r"running on (http://\S+)", self.log)

        return str(until(address, "the server to listen", START_S)[1])


@contextmanager
def api_process(settings: Settings, log: Path, failpoints: str = "") -> Iterator[Api]:
    api = Api(settings, log, failpoints)
    try:
        yield api
    finally:
        api.stop()


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app on a free port, in a thread of this process. Yields its address."""
    options = {**SERVER_OPTIONS, "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Server:
    """PostgreSQL or Valkey in a folder of its own, on the same port each time."""

    def __init__(self, folder: Path, serve: Callable[[], AbstractContextManager[str]]) -> None:
        self._folder, self._serve = folder, serve
        self._running = ExitStack()
        self.start()

    def start(self) -> None:
        self.url = self._running.enter_context(self._serve())

    def kill(self) -> None:
        """SIGKILL to all of its processes: PostgreSQL is many."""
        self._send(signal.SIGKILL)
        self._running.close()

    def quit(self) -> None:
        """PostgreSQL's immediate shutdown: nothing is written any more, and the next start recovers."""
        os.kill(int((self._folder / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
        until(lambda: not self.processes(), "the server to quit")
        self._running.close()

    def freeze(self) -> None:
        self._send(signal.SIGSTOP)

    def wake(self) -> None:
        self._send(signal.SIGCONT)

    def stop(self) -> None:
        self.wake()
        self._running.close()

    def processes(self) -> list[int]:
        """The processes that work in its folder."""
        processes = []
        for path in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if path.readlink().is_relative_to(self._folder):
                    processes.append(int(path.parent.name))
            except OSError:
                continue
        return sorted(processes)

    def _send(self, number: signal.Signals) -> None:
        """Send the signal until all processes have it: new ones may start meanwhile."""
        reached: set[int] = set()
        while new := set(self.processes()) - reached:
            for process in new:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            reached |= new


@contextmanager
def own_postgres() -> Iterator[Server]:
    """A durable PostgreSQL."""
    with _own(lambda folder, port: servers.postgres(folder, durable=True, port=port)) as server:
        yield server


@contextmanager
def own_valkey() -> Iterator[Server]:
    """A Valkey that keeps no data."""
    with _own(lambda folder, port: servers.valkey(folder, port=port)) as server:
        yield server


@contextmanager
def _own(serve: Callable[[Path, int], AbstractContextManager[str]]) -> Iterator[Server]:
    # Not pytest's own folder: PostgreSQL never runs as root and could not enter it.
    with TemporaryDirectory(prefix="distillery-") as name:
        Path(name).chmod(0o755)
        folder, port = Path(name) / "server", servers.free_port()
        server = Server(folder, lambda: serve(folder, port))
        try:
            yield server
        finally:
            server.stop()
