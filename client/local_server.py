"""The embedded server as a process of ours: started, awaited, and never left behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.errors import DistilleryError
from client.tether import GRACE_S

START_S = 90.0
LOOK_S = 0.05


class NotStarted(DistilleryError):
    """The server ended, or said nothing, before it was ready."""


@dataclass(frozen=True)
class LocalServer:
    url: str
    log: Path

    def log_tail(self, lines: int = 30) -> list[str]:
        return tail_of(self.log, lines)


@contextmanager
def local_server(home: Path, slots: int = 1) -> Iterator[LocalServer]:
    """A server on a free port with all that it keeps in `home`; gone when the block ends, however it ends.

    `slots` jobs run at a time, on no more slots than there are cores.
    """
    home.mkdir(parents=True, exist_ok=True)
    ready, log = home / "ready.json", home / "server.log"
    ready.unlink(missing_ok=True)
    command = serve_command(["--port", "0", "--home", str(home), "--ready-file", str(ready)])
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "client.tether", *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(min(slots, os.cpu_count() or 1)),
        )
    try:
        yield LocalServer(_url(process, ready, log), log)
    finally:
        _stop(process)


def serve_command(options: list[str]) -> list[str]:
    return [sys.executable, "-m", "serve", *options]


def tail_of(log: Path, lines: int) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []


def _url(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    until = time.monotonic() + START_S
    while not ready.exists():
        if process.poll() is not None:
            raise NotStarted("\n".join(["the server did not start; its log ends so:", *tail_of(log, 20)]))
        if time.monotonic() > until:
            raise NotStarted("\n".join([f"no server after {START_S:g} s; its log ends so:", *tail_of(log, 20)]))
        time.sleep(LOOK_S)
    return str(json.loads(ready.read_text())["url"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let go of the tether; it stops the server and then ends."""
    assert process.stdin is not None  # noqa: S101 - Popen was given a pipe
    process.stdin.close()
    try:
        process.wait(GRACE_S + 10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment(slots: int) -> dict[str, str]:
    """Ours, without settings that were meant for another server."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("DISTILLERY_")}
    return {**ours, "DISTILLERY_SLOTS": str(slots)}
