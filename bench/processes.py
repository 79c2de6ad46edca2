"""Processes that a bench starts, kills, freezes and starts again, and functions that read /proc."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from base.clock import boottime

REPOSITORY = Path(__file__).parents[1]
START_S = 60
RESTART_S = 0.5
STOP_S = 60
LOG_LINES = 15

T = TypeVar("T")


@dataclass(frozen=True)
class UnexpectedExit:
    """A program that ended although the bench did not kill it."""

    name: str
    code: int
    at: float
    log_tail: str


class Target(Protocol):
    """A program or server that can be killed, frozen and started again."""

    name: str

    def kill(self, restart_after_s: float) -> list[int]: ...
    def freeze(self) -> bool: ...
    def unfreeze(self) -> None: ...
    def restart_if_due(self) -> UnexpectedExit | None: ...
    def stop(self) -> object: ...


class Program:
    """One of our programs (`python -m MODULE`) in a session of its own; its output is appended to `log`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        before: Sequence[str] = (),
    ) -> None:
        """`before`: a command that runs ours, such as strace, and leaves it its place as the child."""
        self.name, self._before = name, before
        self.environment = {**os.environ, **environment}
        self._command, self._log = command, log
        self._restart_at = 0.0
        self._exit_is_known = False
        self.start()

    def start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._exit_is_known = False
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._before, sys.executable, "-m", *self._command],
                cwd=REPOSITORY,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def wait_for_url(self, ready_file: Path) -> str:
        """Return the URL from the ready file that the program writes once it answers requests."""
        wait_until(lambda: ready_file.exists() or not self.alive, f"{self.name} to answer requests", START_S)
        if not ready_file.exists():
            raise SystemExit(f"{self.name} did not start:\n{self.log_tail}")
        url: str = json.loads(ready_file.read_text())["url"]
        return url

    def kill(self, restart_after_s: float = RESTART_S) -> list[int]:
        """Send SIGKILL and plan the restart. Returns the killed processes, none if the program was not running."""
        if not self.alive:
            return []
        self._exit_is_known, self._restart_at = True, time.monotonic() + restart_after_s
        self.process.kill()
        self.process.wait()
        return [self.pid]

    def freeze(self) -> bool:
        if self.alive:
            self.process.send_signal(signal.SIGSTOP)
        return self.alive

    def unfreeze(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def restart_if_due(self) -> UnexpectedExit | None:
        """Start the program again when its restart is due. Returns its exit if that was not a kill of ours."""
        if self.alive:
            return None
        if not self._exit_is_known:
            self._exit_is_known, self._restart_at = True, time.monotonic() + RESTART_S
            return UnexpectedExit(self.name, self.process.returncode, boottime(), self.log_tail)
        if time.monotonic() >= self._restart_at:
            self.start()
        return None

    def request_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.unfreeze()
        self.process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the program, by SIGKILL if it takes too long. Returns its exit code."""
        self.request_stop(number)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def stop_all(programs: Iterable[Program]) -> None:
    """Send all signals before the first wait: the programs then stop at the same time."""
    programs = list(programs)
    for program in programs:
        program.request_stop()
    for program in programs:
        program.stop()


class Server:
    """PostgreSQL or Valkey in a folder of its own; `serve` starts it on the same port each time."""

    def __init__(self, name: str, folder: Path, serve: Callable[[], AbstractContextManager[str]]) -> None:
        self.name = name
        self._folder, self._serve = folder, serve
        self._restart_at: float | None = None
        self._running = ExitStack()
        self.url = self._running.enter_context(serve())

    def kill(self, restart_after_s: float = RESTART_S) -> list[int]:
        """Send SIGKILL to all processes of the server (PostgreSQL has many) and plan the restart."""
        if self._restart_at is not None:
            return []
        killed = processes_in(self._folder)
        for pid in killed:
            send_signal(pid, signal.SIGKILL)
        self._running.close()
        self._restart_at = time.monotonic() + restart_after_s
        return killed

    def freeze(self) -> bool:
        return any([send_signal(pid, signal.SIGSTOP) for pid in processes_in(self._folder)])

    def unfreeze(self) -> None:
        for pid in processes_in(self._folder):
            send_signal(pid, signal.SIGCONT)

    def restart_if_due(self) -> None:
        if self._restart_at is not None and time.monotonic() >= self._restart_at:
            self._running.enter_context(self._serve())
            self._restart_at = None

    def stop(self) -> None:
        self.unfreeze()
        self._running.close()


def wait_until(condition: Callable[[], T], what: str, timeout_s: float, poll_s: float = 0.1) -> T:
    """Return the first true value of `condition`. Raises SystemExit after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise SystemExit(f"waited {timeout_s:g} s for {what}")
        time.sleep(poll_s)
    return value


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit, so that a stopped bench stops the processes that it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def send_signal(pid: int, number: signal.Signals) -> bool:
    """Return False if the process has ended already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def command_line(pid: int) -> str:
    """The command line; empty for a zombie or a process that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def descendants(pid: int) -> list[int]:
    """All processes below a process, its children first."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family[1:]


def ancestors(pid: int) -> list[int]:
    """All processes above a process, its parent first."""
    parents, line = dict(_parents()), [pid]
    while (parent := parents.get(line[-1], 0)) > 1:
        line.append(parent)
    return line[1:]


def processes_in(folder: Path) -> list[int]:
    """Living processes whose working folder is `folder` or below it."""
    return [pid for pid, _ in _parents() if _works_in(pid, folder)]


def processes_using(folder: Path) -> dict[int, str]:
    """Command lines of living processes that work in `folder` or name it in their command line."""
    lines = {pid: command_line(pid) for pid, _ in _parents() if pid != os.getpid()}
    return {pid: line for pid, line in lines.items() if str(folder) in line or _works_in(pid, folder)}


def _works_in(pid: int, folder: Path) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(folder)
    return False


def _parents() -> Iterator[tuple[int, int]]:
    """Every living process and its parent. Zombies are left out: they have ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                yield int(path.parent.name), int(parent)
