"""The system under test: the whole service, each part a process that can be killed, on a disk that can be filled.

    cluster     PostgreSQL (durable), Valkey (without persistence), two API processes, workers
    embedded    `python -m serve` on SQLite, and one worker beside it

All files of the service are in `home`, a small file system of its own if this machine allows a mount.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.chaos.plan import HEARTBEAT_S, LEASE_S, LOOK_S, Setting
from bench.processes import Target
from bench.service import SERVERS, open_folder, run_command, running_programs, running_server
from local import servers

DISK_BYTES = 600_000_000
MIN_FREE_BYTES = 40_000_000
ENGINE_MODULE = "bench.chaos.recording_engine"


@dataclass
class Disk:
    """A small file system at `folder`. If it could not be mounted, it is the machine's own disk and is never filled."""

    folder: Path
    mounted: bool

    def fill(self, free_bytes: int) -> None:
        """Use all disk space except `free_bytes`."""
        size = shutil.disk_usage(self.folder).free - free_bytes
        with self._ballast.open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, size))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@dataclass
class System:
    setting: Setting
    root: Path
    urls: list[str]
    broker: str | None
    disk: Disk
    settings: dict[str, str]
    """The environment of all programs."""
    targets: dict[str, Target] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def database(self) -> str:
        return self.settings.get("DISTILLERY_DATABASE_URL", f"sqlite:///{self.home / 'distillery.db'}")

    @property
    def records(self) -> Path:
        """The step records of all engines."""
        return self.root / "steps"

    def targets_named(self, prefix: str) -> list[Target]:
        return [target for name, target in self.targets.items() if name.startswith(prefix)]


@contextlib.contextmanager
def running_system(setting: Setting, root: Path, workers: int, pause_s: float, warm: bool) -> Iterator[System]:
    """Start all parts; stop them at the end of the block. Logs and records stay in `root`.

    Engines wait `pause_s` before each step; with `warm` they are started before there is a job for them.
    """
    open_folder(root)
    with _disk(root / "home") as disk, contextlib.ExitStack() as running:
        settings, broker = _settings(root, pause_s, warm), None
        targets: dict[str, Target] = {}
        if setting == "cluster":
            ports = [servers.free_port() for _ in range(2)]
            shared = {name: running.enter_context(running_server(name, root / name)) for name in SERVERS}
            broker = shared["valkey"].url
            settings |= {"DISTILLERY_DATABASE_URL": shared["postgres"].url, "DISTILLERY_BROKER_URL": broker}
            targets |= shared
            programs = {f"api-{port}": ("api", {**settings, "DISTILLERY_PORT": str(port)}) for port in ports}
        else:
            ports = [servers.free_port()]
            programs = {"server": ("serve", {**settings, "DISTILLERY_PORT": str(ports[0])})}
            workers -= 1  # The server is one of them.
        programs |= {f"worker-{number}": ("worker", settings) for number in range(1, workers + 1)}
        run_command("store", "migrate", settings=settings)
        targets |= running.enter_context(running_programs(programs, root / "logs"))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        yield System(setting, root, urls, broker, disk, settings, targets)


def _settings(root: Path, pause_s: float, warm: bool) -> dict[str, str]:
    engine = [sys.executable, "-m", ENGINE_MODULE, str(root / "steps"), str(pause_s), "run"]
    words = ", ".join(f'"{word}"' for word in engine)
    return {
        "DISTILLERY_HOME": str(root / "home"),
        "DISTILLERY_ENGINE": f"[{words}]",
        "DISTILLERY_LEASE_S": f"{LEASE_S:g}",
        "DISTILLERY_HEARTBEAT_S": f"{HEARTBEAT_S:g}",
        "DISTILLERY_LOOK_S": f"{LOOK_S:g}",
        "DISTILLERY_RERING_S": "2",
        "DISTILLERY_STOP_GRACE_S": "10",
        "DISTILLERY_BACK_OFF_S": "0.5",
        # Many attempts in a row may be killed before their first checkpoint; no job may fail for that here.
        "DISTILLERY_MAX_ATTEMPTS": "10",
        "DISTILLERY_COLLECT_EVERY_S": "10",
        "DISTILLERY_MIN_FREE_BYTES": str(MIN_FREE_BYTES),
        "DISTILLERY_SLOTS": "1",
        "DISTILLERY_THREADS": "1",
        "DISTILLERY_WARM": str(warm),
    }


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
