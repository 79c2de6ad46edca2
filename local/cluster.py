"""`./run cluster`: the service as a host would run it, without a container engine.

    python -m local.cluster [--workers N] [--home DIR] [--port PORT] [--ready-file PATH]

Real PostgreSQL and Valkey from pip-installed wheels, the migration, the API and N workers, each a process of its own
with its log in DIR/logs. One that dies is told of, with its last words, and started again, as compose would. Ctrl-C
stops all in order: workers save their trainings, then the API, the broker, the database. Killed itself, it takes all
with it, as a host that loses power would: the next start goes on from what is on the disk.
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
from functools import partial
from pathlib import Path
from typing import Any

from base.defaults import PORT
from base.errors import StorageFull
from base.files import write_text
from base.processes import end_with_parent
from local.servers import AS_NOBODY, Server, ServerFailed, free_port, prepared_postgres, prepared_valkey

REPOSITORY = Path(__file__).parents[1]
START_S = 60
STOP_S = 60
SOON_S = 5
ENOUGH = 3
"""One that has died so often, each time soon after its start, would do so for ever."""
AGAIN_S = 1.0
"""So much longer is waited each time, before one that died soon is started again."""
LOOK_S = 0.2
LAST_LINES = 15

_told, _tell = os.pipe()


class Stop(Exception):
    """Ctrl-C, or SIGTERM."""


class Died(Exception):
    """A process that the cluster cannot do without ended by itself."""


@dataclass(frozen=True)
class Program:
    """What a member runs, where, and how it is asked to end."""

    name: str
    command: Sequence[str | Path]
    settings: Mapping[str, str] = field(default_factory=dict)
    folder: Path = REPOSITORY
    stop: signal.Signals = signal.SIGTERM
    user: Mapping[str, Any] = field(default_factory=dict)


class Member:
    """One process of the cluster, and its log. It ends with us, however we end."""

    def __init__(self, program: Program, home: Path) -> None:
        self._program = program
        self._log = home / "logs" / f"{program.name}.log"
        self._died_soon = 0
        self._start()

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._started_at = time.monotonic()
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C reaches us alone, and we stop all in order.
            self._process = subprocess.Popen(
                self._program.command,
                cwd=self._program.folder,
                env={**os.environ, **self._program.settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - we have one thread
                **self._program.user,
            )

    def look_after(self) -> None:
        """Start it again if it died; Died if that is of no use."""
        code = self._process.poll()
        if code is None:
            return
        name = self._program.name
        tail = "\n".join(f"    {line}" for line in self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        self._died_soon = self._died_soon + 1 if time.monotonic() - self._started_at < SOON_S else 0
        if self._died_soon == ENOUGH:
            raise Died(f"{name} ended with {_how(code)} again and again; the end of {self._log}:\n{tail}")
        _say(f"{name} ended with {_how(code)} and is started again; the end of {self._log}:\n{tail}")
        # What a killed PostgreSQL has left behind takes a moment to end, and until then it cannot start.
        _pause(self._died_soon * AGAIN_S)
        self._start()

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(self._program.stop)

    def wait(self) -> None:
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            _say(f"{self._program.name} does not stop, and is killed")
            self._process.kill()
            self._process.wait()


def run(workers: int, home: Path, port: int, ready_file: Path | None) -> None:
    """Until Stop, which Ctrl-C raises. Died when a process cannot be kept alive."""
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
        with _members([_ours("api", "api", settings)], home) as apis, _members(_crew(workers, settings), home) as crew:
            _wait_until(f"the API answers at {url}", lambda: _is_ready(url), [*servers, *apis])
            _say(f"Distillery is at {url}: PostgreSQL, Valkey, API, {workers} workers; logs in {home / 'logs'}")
            if ready_file:
                told = {"url": url, "pid": os.getpid(), "database": database.url, "broker": broker.url}
                write_text(ready_file, json.dumps(told))
            while True:
                for member in (*servers, *apis, *crew):
                    member.look_after()
                _pause(LOOK_S)


def _server(name: str, server: Server) -> Program:
    return Program(name, server.command, folder=server.home, stop=server.stop, user=AS_NOBODY)


def _ours(name: str, module: str, settings: Mapping[str, str]) -> Program:
    return Program(name, (sys.executable, "-m", module), settings)


def _crew(workers: int, settings: Mapping[str, str]) -> list[Program]:
    """Workers that share this host's cores evenly: without GPUs each would take them all."""
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    one = {**settings, "DISTILLERY_SLOTS": "1", "DISTILLERY_THREADS": str(threads)}
    return [_ours(f"worker-{number}", "worker", one) for number in range(1, workers + 1)]


@contextmanager
def _members(wanted: Sequence[Program], home: Path) -> Iterator[list[Member]]:
    """Processes that are all asked to stop before the first is waited for."""
    members: list[Member] = []
    try:
        for program in wanted:
            members.append(Member(program, home))  # noqa: PERF401 - each is known before the next is started
        yield members
    finally:
        for member in members:
            member.ask_to_stop()
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


def _wait_until(what: str, look: Callable[[], bool], members: Sequence[Member]) -> None:
    until = time.monotonic() + START_S
    while not look():
        for member in members:
            member.look_after()
        if time.monotonic() > until:
            raise Died(f"waited {START_S} s in vain until {what}")
        _pause(0.1)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _say(text: str) -> None:
    print(text, flush=True)


def _pause(seconds: float) -> None:
    """Wait; Stop at once where a signal has come by then. Only here: nothing is interrupted half done."""
    if select.select([_told], [], [], seconds)[0]:
        raise Stop


def _listen_to_signals() -> None:
    """SIGINT and SIGTERM are only noted, for `_pause`: a handler that raises may lose a process just started."""
    os.set_blocking(_tell, False)
    signal.set_wakeup_fd(_tell, warn_on_full_buffer=False)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.cluster", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--home", type=Path, default=Path("distillery-data/cluster"))
    parser.add_argument("--port", type=int, default=PORT, help="0 takes any free one")
    parser.add_argument("--ready-file", type=Path, help='gets {"url", "pid", …} as JSON once requests are answered')
    given = parser.parse_args()
    _listen_to_signals()
    try:
        run(given.workers, given.home, given.port, given.ready_file)
    except Stop:
        _say("stopped")
    except (Died, ServerFailed, StorageFull, OSError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
