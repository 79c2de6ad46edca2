"""`./run cluster`: the service as a host would run it, without a container engine.

    python -m local.cluster [--workers N] [--home DIR] [--port PORT] [--ready-file PATH]

Real PostgreSQL and Valkey from pip-installed wheels, the migration, the API and N workers, each a process of its own
with its log in DIR/logs. A process that dies is reported with the end of its log and started again, as by compose.
Ctrl-C stops all in order: workers save their trainings, then the API, the broker, the database. If the cluster itself
is killed, all its processes end too, as on a host that loses power; the next start continues from the disk.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from base.errors import StorageFull
from base.files import write_text
from base.processes import end_with_parent, stop_signals
from local.servers import AS_NOBODY, Server, ServerFailed, free_port, prepared_postgres, prepared_valkey
from store.settings import Settings

REPOSITORY = Path(__file__).parents[1]
START_S = 60
STOP_S = 60
SOON_S = 5
ENOUGH = 3
"""The number of deaths, each soon after a start, after which a process is not started again."""
AGAIN_S = 1.0
"""The increase of the wait before each further start of a process that dies soon after its start."""
POLL_S = 0.2
LAST_LINES = 15

_signals = cache(stop_signals)


class Stop(Exception):
    """Ctrl-C, or SIGTERM."""


class Died(Exception):
    """A process of the cluster has ended, and starting it again does not help."""


@dataclass(frozen=True)
class Program:
    """A member's program: its command, its folder, and the signal that stops it."""

    name: str
    command: Sequence[str | Path]
    settings: Mapping[str, str] = field(default_factory=dict)
    folder: Path = REPOSITORY
    stop: signal.Signals = signal.SIGTERM
    user: Mapping[str, Any] = field(default_factory=dict)


class Member:
    """One process of the cluster, and its log. It ends when this process ends, even by SIGKILL."""

    def __init__(self, program: Program, home: Path) -> None:
        self._program = program
        self._log = home / "logs" / f"{program.name}.log"
        self._died_soon = 0
        self._start()

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._started_at = time.monotonic()
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C reaches only this process, which stops all in order.
            self._process = subprocess.Popen(
                self._program.command,
                cwd=self._program.folder,
                env={**os.environ, **self._program.settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - this process has one thread
                **self._program.user,
            )

    def restart_if_dead(self) -> None:
        """Start the process again if it has ended. Raises Died if it has died too often."""
        code = self._process.poll()
        if code is None:
            return
        name = self._program.name
        tail = "\n".join(f"    {line}" for line in self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        self._died_soon = self._died_soon + 1 if time.monotonic() - self._started_at < SOON_S else 0
        if self._died_soon == ENOUGH:
            raise Died(f"{name} ended with {_how(code)} {ENOUGH} times; the end of {self._log}:\n{tail}")
        _print(f"{name} ended with {_how(code)} and is started again; the end of {self._log}:\n{tail}")
        # PostgreSQL cannot start before the child processes of the killed server have ended.
        _wait(self._died_soon * AGAIN_S)
        self._start()

    def request_stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(self._program.stop)

    def wait(self) -> None:
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            _print(f"{self._program.name} does not stop and is killed")
            self._process.kill()
            self._process.wait()


def run(workers: int, home: Path, port: int, ready_file: Path | None) -> None:
    """Run the cluster until Stop, which Ctrl-C raises. Raises Died if a process cannot be kept alive."""
    home = home.absolute()
    with (
        prepared_postgres(home / "postgres", durable=True) as database,
        prepared_valkey(home / "valkey", durable=True) as broker,
        _members([_server("postgres", database), _server("valkey", broker)], home) as servers,
    ):
        _wait_until("PostgreSQL and Valkey answer", lambda: database.answers() and broker.answers(), servers)
        port = port or free_port()
        settings = {
            "DISTILLERY_HOME": str(home),
            "DISTILLERY_DATABASE_URL": database.url,
            "DISTILLERY_BROKER_URL": broker.url,
            "DISTILLERY_PORT": str(port),
        }
        _migrate(settings)
        url = f"http://127.0.0.1:{port}"
        with (
            _members([_ours("api", "api", settings)], home) as apis,
            _members(_workers(workers, settings), home) as crew,
        ):
            _wait_until(f"the API answers at {url}", lambda: _is_ready(url), [*servers, *apis])
            _print(f"Distillery is at {url}: PostgreSQL, Valkey, API, {workers} workers; logs in {home / 'logs'}")
            if ready_file:
                addresses = {"url": url, "pid": os.getpid(), "database": database.url, "broker": broker.url}
                write_text(ready_file, json.dumps(addresses))
            while True:
                for member in (*servers, *apis, *crew):
                    member.restart_if_dead()
                _wait(POLL_S)


def _server(name: str, server: Server) -> Program:
    return Program(name, server.command, folder=server.home, stop=server.stop, user=AS_NOBODY)


def _ours(name: str, module: str, settings: Mapping[str, str]) -> Program:
    return Program(name, (sys.executable, "-m", module), settings)


def _workers(number: int, settings: Mapping[str, str]) -> list[Program]:
    """Return workers that share this host's cores evenly: by default each would use all cores."""
    threads = max(1, (os.cpu_count() or 1) // max(1, number))
    settings = {**settings, "DISTILLERY_SLOTS": "1", "DISTILLERY_THREADS": str(threads)}
    return [_ours(f"worker-{index}", "worker", settings) for index in range(1, number + 1)]


@contextmanager
def _members(programs: Sequence[Program], home: Path) -> Iterator[list[Member]]:
    """Start the programs. At the end, request all to stop before waiting for the first."""
    members: list[Member] = []
    try:
        for program in programs:
            members.append(Member(program, home))  # noqa: PERF401 - if one cannot start, those before it are stopped
        yield members
    finally:
        for member in members:
            member.request_stop()
        for member in members:
            member.wait()


def _migrate(settings: Mapping[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "store", "migrate"],
        cwd=REPOSITORY,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        raise Died(f"the migration failed:\n{done.stderr}")


def _wait_until(what: str, condition: Callable[[], bool], members: Sequence[Member]) -> None:
    until = time.monotonic() + START_S
    while not condition():
        for member in members:
            member.restart_if_dead()
        if time.monotonic() > until:
            raise Died(f"after {START_S} s it is not true that {what}")
        _wait(0.1)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _print(text: str) -> None:
    print(text, flush=True)


def _wait(seconds: float) -> None:
    """Sleep. Raises Stop if a signal has come. Signals are checked only here, so that they interrupt nothing else."""
    if select.select([_signals()], [], [], seconds)[0]:
        raise Stop


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.cluster", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--home", type=Path, default=Path("distillery-cluster"))
    parser.add_argument("--port", type=int, default=Settings.model_fields["port"].default, help="0 takes a free one")
    parser.add_argument("--ready-file", type=Path, help='file for {"url", "pid", …} as JSON when requests are answered')
    options = parser.parse_args()
    _signals()
    try:
        run(options.workers, options.home, options.port, options.ready_file)
    except Stop:
        _print("stopped")
    except (Died, ServerFailed, StorageFull, OSError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
