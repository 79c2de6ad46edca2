"""The service in both of its sizes, each part a process that can be killed, on a disk that can be filled.

    cluster     PostgreSQL (durable), Valkey (forgetful), two API processes, workers
    embedded    `python -m serve` on SQLite, and one worker beside it

All that the service keeps lies in `home`, on a small file system of its own where this machine lets us mount one.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.chaos.plan import HEARTBEAT_S, LEASE_S, LOOK_S, Setting
from bench.processes import ROOT, Member, Program, Server
from local import servers

DISK_BYTES = 600_000_000
FLOOR_BYTES = 40_000_000
MODULE = "bench.chaos.recording_engine"
SERVERS: Mapping[str, Callable[..., contextlib.AbstractContextManager[str]]] = {
    "postgres": partial(servers.postgres, durable=True),
    "valkey": servers.valkey,
}
"""Each works in a folder of its name."""


@dataclass
class Disk:
    """A small file system at `folder`; without the right to mount one it is the machine's, and never filled."""

    folder: Path
    mounted: bool

    def leave(self, free_bytes: int) -> None:
        """Take all room but so much."""
        taken = shutil.disk_usage(self.folder).free - free_bytes
        with self._ballast.open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, taken))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@dataclass
class Service:
    setting: Setting
    root: Path
    urls: list[str]
    database: str
    broker: str | None
    disk: Disk
    settings: Mapping[str, str]
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def records(self) -> Path:
        return self.root / "steps"

    def named(self, prefix: str) -> list[Member]:
        return [member for name, member in self.members.items() if name.startswith(prefix)]

    def run(self, *command: str) -> str:
        """A command of ours with the service's settings, to its end; what it printed."""
        environment = {**os.environ, **self.settings}
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout


@contextlib.contextmanager
def started(setting: Setting, root: Path, workers: int) -> Iterator[Service]:
    """All of it, until the block ends; then nothing of it, but for logs and records in `root`."""
    # As root, PostgreSQL runs as somebody else, who must be able to reach its data.
    root.chmod(0o711)
    with _disk(root / "home") as disk, contextlib.ExitStack() as running:
        service = (_cluster if setting == "cluster" else _embedded)(root, disk, workers, running)
        yield service


def _cluster(root: Path, disk: Disk, workers: int, running: contextlib.ExitStack) -> Service:
    # Their ports must outlast them: everything else knows them by URL.
    shared: dict[str, Server] = {}
    for name, serve in SERVERS.items():
        shared[name] = Server(name, root / name, partial(serve, root / name, port=servers.free_port()))
        running.callback(shared[name].stop)
    database, broker = shared["postgres"].url, shared["valkey"].url
    ports = [servers.free_port() for _ in range(2)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    settings = _settings(root, {"DISTILLERY_DATABASE_URL": database, "DISTILLERY_BROKER_URL": broker})
    service = Service("cluster", root, urls, database, broker, disk, settings, dict(shared))
    service.run("store", "migrate")
    programs = {f"api-{port}": (["api"], {"DISTILLERY_PORT": str(port)}) for port in ports}
    programs |= {f"worker-{number}": (["worker"], {}) for number in range(1, workers + 1)}
    _start(service, programs, running)
    return service


def _embedded(root: Path, disk: Disk, workers: int, running: contextlib.ExitStack) -> Service:
    port = servers.free_port()
    settings = _settings(root, {"DISTILLERY_PORT": str(port)})
    database = f"sqlite:///{disk.folder / 'distillery.db'}"
    service = Service("embedded", root, [f"http://127.0.0.1:{port}"], database, None, disk, settings)
    service.run("store", "migrate")
    programs: dict[str, tuple[list[str], dict[str, str]]] = {"server": (["serve"], {})}
    programs |= {f"worker-{number}": (["worker"], {}) for number in range(1, workers)}
    _start(service, programs, running)
    return service


def _settings(root: Path, further: Mapping[str, str]) -> dict[str, str]:
    engine = [sys.executable, "-m", MODULE, str(root / "steps"), "run"]
    listed = ", ".join(f'"{word}"' for word in engine)
    return {
        "DISTILLERY_HOME": str(root / "home"),
        "DISTILLERY_ENGINE": f"[{listed}]",
        "DISTILLERY_LEASE_S": f"{LEASE_S:g}",
        "DISTILLERY_HEARTBEAT_S": f"{HEARTBEAT_S:g}",
        "DISTILLERY_LOOK_S": f"{LOOK_S:g}",
        "DISTILLERY_RERING_S": "2",
        "DISTILLERY_STOP_GRACE_S": "10",
        "DISTILLERY_BACK_OFF_S": "0.5",
        # So many attempts in a row may meet a fault before their first checkpoint: the storm is what kills them.
        "DISTILLERY_MAX_ATTEMPTS": "10",
        "DISTILLERY_COLLECT_EVERY_S": "10",
        "DISTILLERY_MIN_FREE_BYTES": str(FLOOR_BYTES),
        "DISTILLERY_SLOTS": "1",
        "DISTILLERY_THREADS": "1",
        **further,
    }


def _start(
    service: Service, programs: Mapping[str, tuple[list[str], dict[str, str]]], running: contextlib.ExitStack
) -> None:
    started: list[Program] = []
    running.callback(stop_all, started)
    for name, (command, further) in programs.items():
        log = service.root / "logs" / f"{name}.log"
        started.append(Program(name, command, log, {**service.settings, **further}))
        service.members[name] = started[-1]


def stop_all(programs: Iterable[Program]) -> None:
    """Everybody is asked before anybody is waited for."""
    programs = list(programs)
    for program in programs:
        program.ask_to_stop()
    for program in programs:
        program.stop()


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Disk]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "distillery-chaos", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
