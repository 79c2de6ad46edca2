"""`./run cluster`: the service as a host would run it, without a container engine.

    python -m local.cluster [--workers N] [--home DIR] [--port PORT] [--ready-file PATH]

Real PostgreSQL and Valkey from pip-installed wheels, the migration, the API and N workers, each a process of its own
with its log in DIR/logs. One that dies is told of, with its last words, and started again, as compose would. Ctrl-C
stops all in order: workers save their trainings, then the API, the broker, the database.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from local.servers import postgres, valkey

REPOSITORY = Path(__file__).parents[1]
START_S = 60
STOP_S = 60
SOON_S = 5
ENOUGH = 3
"""One that has died so often, each time soon after its start, would do so for ever."""
LAST_LINES = 15


class Stop(Exception):
    """Ctrl-C, or SIGTERM."""


class Died(Exception):
    """A process that the cluster cannot do without ended by itself."""


class Member:
    """One process of the cluster, and its log."""

    def __init__(self, name: str, module: str, home: Path, settings: Mapping[str, str]) -> None:
        self.name, self._module = name, module
        self._log = home / "logs" / f"{name}.log"
        self._environment = {**os.environ, **settings}
        self._died_soon = 0
        self.start()

    def start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._started_at = time.monotonic()
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C reaches us alone, and we stop all in order.
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def look_after(self) -> None:
        """Start it again if it died; Died if that is of no use."""
        code = self._process.poll()
        if code is None:
            return
        tail = "\n".join(f"    {line}" for line in self._log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        self._died_soon = self._died_soon + 1 if time.monotonic() - self._started_at < SOON_S else 0
        if self._died_soon == ENOUGH:
            raise Died(f"{self.name} ended with {_how(code)} again and again; the end of {self._log}:\n{tail}")
        _say(f"{self.name} ended with {_how(code)} and is started again; the end of {self._log}:\n{tail}")
        self.start()

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            _say(f"{self.name} does not stop, and is killed")
            self._process.kill()
            self._process.wait()


def run(workers: int, home: Path, port: int, ready_file: Path | None) -> None:
    """Until Stop, which Ctrl-C raises. Died when a process cannot be kept alive."""
    home = home.absolute()
    with postgres(home / "postgres", durable=True) as database, valkey(home / "valkey", durable=True) as broker:
        port = port or _free_port()
        settings = {
            "DISTILLERY_HOME": str(home),
            "DISTILLERY_DATABASE_URL": database,
            "DISTILLERY_BROKER_URL": broker,
            "DISTILLERY_PORT": str(port),
        }
        _migrate(settings)
        url = f"http://127.0.0.1:{port}"
        with _members([("api", "api", settings)], home) as apis, _members(_crew(workers, settings), home) as crew:
            _wait_until_ready(url, apis)
            _say(f"Distillery is at {url}: PostgreSQL, Valkey, API, {workers} workers; logs in {home / 'logs'}")
            if ready_file:
                _write_whole(ready_file, {"url": url, "pid": os.getpid(), "database": database, "broker": broker})
            while True:
                for member in (*apis, *crew):
                    member.look_after()
                time.sleep(0.2)


def _crew(workers: int, settings: Mapping[str, str]) -> list[tuple[str, str, Mapping[str, str]]]:
    """Workers that share this host's cores evenly: without GPUs each would take them all."""
    threads = max(1, (os.cpu_count() or 1) // max(1, workers))
    one = {**settings, "DISTILLERY_SLOTS": "1", "DISTILLERY_THREADS": str(threads)}
    return [(f"worker-{number}", "worker", one) for number in range(1, workers + 1)]


@contextmanager
def _members(wanted: Sequence[tuple[str, str, Mapping[str, str]]], home: Path) -> Iterator[list[Member]]:
    """Processes that are all asked to stop before the first is waited for."""
    members: list[Member] = []
    try:
        for name, module, settings in wanted:
            members.append(Member(name, module, home, settings))
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
    )
    if done.returncode:
        raise Died(f"the migration failed:\n{done.stderr}")


def _wait_until_ready(url: str, apis: list[Member]) -> None:
    until = time.monotonic() + START_S
    while not _is_ready(url):
        for api in apis:
            api.look_after()
        if time.monotonic() > until:
            raise Died(f"the API did not answer at {url} within {START_S} s")
        time.sleep(0.1)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310 - our own server
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _write_whole(path: Path, content: Mapping[str, object]) -> None:
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(json.dumps(content))
    half.replace(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _say(text: str) -> None:
    print(text, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    # Only the first: what follows is the orderly end, and is not to be interrupted.
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise Stop


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.cluster", description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--home", type=Path, default=Path("distillery-data/cluster"))
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--ready-file", type=Path, help='gets {"url", "pid", …} as JSON once requests are answered')
    given = parser.parse_args()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, _stop)
    try:
        run(given.workers, given.home, given.port, given.ready_file)
    except Stop:
        _say("stopped")
    except Died as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
