"""The whole service for a bench: embedded, as a cluster, or as a cluster whose parts can be killed."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.processes import REPOSITORY, START_S, Program, Server, stop_all, wait_until
from client.sdk import Distillery
from local import servers

Serve = Callable[..., AbstractContextManager[str]]
SERVERS: Mapping[str, Serve] = {"postgres": partial(servers.postgres, durable=True), "valkey": servers.valkey}
"""The servers of a cluster, each in a folder of its name."""


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 1, **settings: str) -> Iterator[str]:
    """Run `local.cluster`: PostgreSQL, Valkey, API and Celery workers. Yields the API's URL."""
    open_folder(folder)
    with _running(folder, "local.cluster", "--port", "0", "--workers", str(workers), **settings) as url:
        yield url


@contextlib.contextmanager
def embedded(folder: Path, **settings: str) -> Iterator[str]:
    """Run `python -m serve`, one process on SQLite. Yields its URL."""
    with _running(folder, "serve", "--port", "0", **settings) as url:
        yield url


SETTINGS: dict[str, Callable[..., AbstractContextManager[str]]] = {"embedded": embedded, "cluster": cluster}


@contextlib.contextmanager
def _running(folder: Path, module: str, *arguments: str, **settings: str) -> Iterator[str]:
    ready_file = folder / "ready.json"
    command = [module, *arguments, "--home", str(folder / "home"), "--ready-file", str(ready_file)]
    program = Program(module, command, folder / f"{module}.log", settings)
    try:
        yield program.wait_for_url(ready_file)
    finally:
        program.stop()


@dataclass
class KillableCluster:
    """A cluster whose parts can be killed. Each worker has its own home, as on a host of its own; files, database and
    broker are shared."""

    url: str
    files: Path
    database: Server
    api: Program
    workers: list[Program]


@contextlib.contextmanager
def killable_cluster(folder: Path, workers: int, **settings: str) -> Iterator[KillableCluster]:
    """Start all parts with the default timings, each worker with one slot and one thread. Yields when ready."""
    folder.mkdir()
    open_folder(folder)
    with contextlib.ExitStack() as running:
        database, broker = (running.enter_context(running_server(name, folder / name)) for name in SERVERS)
        port = servers.free_port()
        shared = {
            "DISTILLERY_DATABASE_URL": database.url,
            "DISTILLERY_BROKER_URL": broker.url,
            "DISTILLERY_FILES": str(folder / "files"),
            "DISTILLERY_PORT": str(port),
            "DISTILLERY_SLOTS": "1",
            "DISTILLERY_THREADS": "1",
            **settings,
        }
        run_command("store", "migrate", settings=shared)
        modules = {"api": "api", **{f"worker-{number}": "worker" for number in range(1, workers + 1)}}
        homes = {name: {"DISTILLERY_HOME": str(folder / name)} for name in modules}
        programs = {name: (module, {**shared, **homes[name]}) for name, module in modules.items()}
        api, *others = running.enter_context(running_programs(programs, folder)).values()
        url = f"http://127.0.0.1:{port}"
        await_workers(url, workers)
        yield KillableCluster(url, folder / "files", database, api, others)


@contextlib.contextmanager
def running_server(name: str, folder: Path) -> Iterator[Server]:
    """A server on a fixed port: all other parts have its URL, which has to stay the same after a restart."""
    server = Server(name, folder, partial(SERVERS[name], folder, port=servers.free_port()))
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def running_programs(
    programs: Mapping[str, tuple[str, Mapping[str, str]]], logs: Path
) -> Iterator[Mapping[str, Program]]:
    """Start `python -m MODULE` with settings, by name; stop all at the end of the block."""
    started: dict[str, Program] = {}
    try:
        for name, (module, settings) in programs.items():
            started[name] = Program(name, [module], logs / f"{name}.log", settings)
        yield started
    finally:
        stop_all(started.values())


def run_command(*command: str, settings: Mapping[str, str]) -> None:
    """Run `python -m COMMAND` with the service's settings. Raises RuntimeError if it fails."""
    environment = {**os.environ, **settings}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def open_folder(folder: Path) -> None:
    """Let other users enter. If the bench runs as root, PostgreSQL runs as another user and has to reach its data."""
    folder.chmod(0o711)


def await_workers(url: str, workers: int) -> None:
    """Wait until so many workers are alive."""
    with Distillery(url, retries=20) as service:
        wait_until(
            lambda: sum(worker["alive"] for worker in service.workers()) >= workers, f"{workers} workers", START_S
        )
