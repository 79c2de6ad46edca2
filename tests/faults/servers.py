"""The REST server, the database and the broker as processes that a test may kill, freeze and start again."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from local import servers
from store.settings import Settings
from tests.worker.processes import until
from tests.worker.job_database import REPOSITORY

START_S = 60.0
"""A server that is imported on a busy machine."""
SPEC = {"dataset": "digits", "student": "convnet8", "method": "supervised", "training": {"epochs": 1}}
STEPS = 10
"""So many the fake engine trains for a job that came over REST."""


class Api:
    """`python -m api` on a port of its own."""

    def __init__(self, settings: Settings, log: Path, failpoints: str = "") -> None:
        given = {f"DISTILLERY_{name.upper()}": str(v) for name, v in settings.model_dump(exclude_none=True).items()}
        given |= {"DISTILLERY_PORT": "0", "DISTILLERY_FAILPOINTS": failpoints}
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api"], env={**os.environ, **given}, cwd=REPOSITORY, stdout=output, stderr=output
            )
        self.http = httpx.Client(base_url=self._address(), timeout=60)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def post(self, key: str | None = None, **changes: Any) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.http.post("/v1/jobs", json={**SPEC, **changes}, headers=headers)

    def accept(self) -> str:
        """Send a job; its id."""
        answer = self.post()
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

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

    def _address(self) -> str:
        def told() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log
            return re.search(r"running on (http://\S+)", self.log)

        return str(until(told, "the server to listen", START_S)[1])


@contextmanager
def api_process(settings: Settings, log: Path, failpoints: str = "") -> Iterator[Api]:
    api = Api(settings, log, failpoints)
    try:
        yield api
    finally:
        api.stop()


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
        """What PostgreSQL calls an immediate shutdown: nothing is written any more, and the next start recovers."""
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
        """Those that work in its folder."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cwd"):
            try:
                if path.readlink().is_relative_to(self._folder):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return sorted(found)

    def _send(self, number: signal.Signals) -> None:
        """Until all have it: one that was just born did not hear the first call."""
        reached: set[int] = set()
        while new := set(self.processes()) - reached:
            for process in new:
                with suppress(ProcessLookupError):
                    os.kill(process, number)
            reached |= new


@contextmanager
def own_postgres() -> Iterator[Server]:
    """One that keeps what it acknowledged, whatever becomes of it."""
    with _own(lambda folder, port: servers.postgres(folder, durable=True, port=port)) as server:
        yield server


@contextmanager
def own_valkey() -> Iterator[Server]:
    """One that keeps nothing."""
    with _own(lambda folder, port: servers.valkey(folder, port=port)) as server:
        yield server


@contextmanager
def _own(serve: Callable[[Path, int], AbstractContextManager[str]]) -> Iterator[Server]:
    # Not pytest's own folder: PostgreSQL, which never runs as root, could not look into it.
    with TemporaryDirectory(prefix="distillery-") as name:
        Path(name).chmod(0o755)
        folder, port = Path(name) / "server", servers.free_port()
        server = Server(folder, lambda: serve(folder, port))
        try:
            yield server
        finally:
            server.stop()
