"""The embedded server as a child process: start it, wait until it answers, stop it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from base.processes import STOP_GRACE_S
from client.errors import DistilleryError

START_TIMEOUT_S = 90.0
POLL_S = 0.05


class NotStarted(DistilleryError):
    """The server ended, or did not answer in time."""


@dataclass(frozen=True)
class LocalServer:
    url: str
    log: Path

    def log_tail(self, lines: int = 30) -> list[str]:
        return _tail(self.log, lines)


@contextmanager
def local_server(home: Path, slots: int = 1) -> Iterator[LocalServer]:
    """Run a server on a free port with its data in `home`. It stops at the end of the block, and if this process dies.

    It runs `slots` jobs at a time, but at most one for each core.
    """
    home.mkdir(parents=True, exist_ok=True)
    ready, log = home / "ready.json", home / "server.log"
    ready.unlink(missing_ok=True)
    command = serve_command(["--port", "0", "--home", str(home), "--ready-file", str(ready)])
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "base.processes", *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(min(slots, os.cpu_count() or 1)),
        )
    try:
        yield LocalServer(_wait_for_url(process, ready, log), log)
    finally:
        _stop(process)


def serve_command(options: list[str]) -> list[str]:
    return [sys.executable, "-m", "serve", *options]


def _tail(log: Path, lines: int) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []


def _wait_for_url(process: subprocess.Popen[bytes], ready: Path, log: Path) -> str:
    until = time.monotonic() + START_TIMEOUT_S
    while not ready.exists():
        if process.poll() is not None:
            raise NotStarted("\n".join(["the server did not start; the end of its log:", *_tail(log, 20)]))
        if time.monotonic() > until:
            raise NotStarted(
                "\n".join(
                    [f"the server did not answer within {START_TIMEOUT_S:g} s; the end of its log:", *_tail(log, 20)]
                )
            )
        time.sleep(POLL_S)
    return str(json.loads(ready.read_text())["url"])


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None  # noqa: S101 - Popen was called with stdin=PIPE
    process.stdin.close()
    try:
        process.wait(STOP_GRACE_S + 10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment(slots: int) -> dict[str, str]:
    """Return this process's environment without DISTILLERY_ settings, which are meant for another server."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DISTILLERY_")}
    return {**inherited, "DISTILLERY_SLOTS": str(slots)}
