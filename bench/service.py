"""The whole service for a bench, gone afterwards: in both of its sizes, or part by part for those that kill parts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.chaos.system import stop_all
from bench.processes import Program, Server
from client.sdk import Distillery
from local import servers

START_S = 60


def leave_in_order() -> None:
    """Whoever stops a bench with SIGTERM must not leave a service behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 1, **settings: str) -> Iterator[str]:
    """`local.cluster`: PostgreSQL, Valkey, API and Celery workers; yields the API's address."""
    # As root, PostgreSQL runs as somebody else, who must be able to reach its data.
    folder.chmod(0o711)
    with _program(folder, "local.cluster", "--port", "0", "--workers", str(workers), **settings) as address:
        yield address


@contextlib.contextmanager
def embedded(folder: Path, **settings: str) -> Iterator[str]:
    """`python -m serve`, one process on SQLite; yields its address."""
    with _program(folder, "serve", "--port", "0", **settings) as address:
        yield address


SETTINGS: dict[str, Callable[..., AbstractContextManager[str]]] = {"embedded": embedded, "cluster": cluster}


@contextlib.contextmanager
def _program(folder: Path, module: str, *arguments: str, **settings: str) -> Iterator[str]:
    ready, log = folder / "ready.json", folder / f"{module}.log"
    command = [sys.executable, "-m", module, *arguments, "--home", str(folder / "home"), "--ready-file", str(ready)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **settings})
    try:
        yield _address(ready, process, log)
    finally:
        process.terminate()
        process.wait(START_S)


def _address(ready: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit("the service did not come up:\n" + "\n".join(log.read_text().splitlines()[-20:]))
        time.sleep(0.1)
    address: str = json.loads(ready.read_text())["url"]
    return address


@dataclass
class Parts:
    """A cluster whose every part may be killed. Each worker has a home of its own, as on a host of its own; files,
    database and broker are shared."""

    url: str
    files: Path
    database: Server
    api: Program
    workers: list[Program]


@contextlib.contextmanager
def parts(folder: Path, workers: int, **settings: str) -> Iterator[Parts]:
    """All at the default timings, each worker with one slot and one thread; ready when yielded."""
    folder.mkdir()
    folder.chmod(0o711)
    port = servers.free_port()
    serve = partial(servers.postgres, folder / "postgres", durable=True, port=servers.free_port())
    with contextlib.ExitStack() as running:
        database = Server("postgres", folder / "postgres", serve)
        running.callback(database.stop)
        broker = running.enter_context(servers.valkey(folder / "valkey"))
        shared = {
            "DISTILLERY_DATABASE_URL": database.url,
            "DISTILLERY_BROKER_URL": broker,
            "DISTILLERY_FILES": str(folder / "files"),
            "DISTILLERY_PORT": str(port),
            "DISTILLERY_SLOTS": "1",
            "DISTILLERY_THREADS": "1",
            **settings,
        }
        migrate = [sys.executable, "-m", "store", "migrate"]
        subprocess.run(migrate, env={**os.environ, **shared}, check=True, stdout=subprocess.DEVNULL)
        programs: list[Program] = []
        running.callback(stop_all, programs)
        for name in ("api", *(f"worker-{number}" for number in range(1, workers + 1))):
            home = {"DISTILLERY_HOME": str(folder / name)}
            module = name.partition("-")[0]
            programs.append(Program(name, [module], folder / f"{name}.log", {**shared, **home}))
        address = f"http://127.0.0.1:{port}"
        await_workers(address, workers)
        yield Parts(address, folder / "files", database, programs[0], programs[1:])


def await_workers(address: str, workers: int) -> None:
    """Until so many are alive. Raises SystemExit when they do not come."""
    end = time.monotonic() + START_S
    with Distillery(address, retries=20) as service:
        while sum(worker["alive"] for worker in service.workers()) < workers:
            if time.monotonic() > end:
                raise SystemExit(f"{workers} workers were not alive within {START_S} s")
            time.sleep(0.1)
