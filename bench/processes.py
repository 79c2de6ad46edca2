"""Processes: those that a storm keeps alive as an init system would, and all that are to be found in /proc."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[1]
RESTART_S = 0.5
STOP_S = 60
LAST_LINES = 15


def boottime() -> float:
    """Seconds on the clock of guards and step records, the same in every process of this machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class Exit:
    """A process that ended although nobody killed it."""

    name: str
    code: int
    at: float
    last_words: str


class Member(Protocol):
    """What can be killed, frozen, and found alive again after a while."""

    name: str

    def kill(self, back_in_s: float) -> list[int]: ...
    def freeze(self) -> bool: ...
    def wake(self) -> None: ...
    def look_after(self) -> Exit | None: ...
    def stop(self) -> None: ...


class Program:
    """A Python program of ours (`python -m MODULE`), its output in `log`."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._command, self._log, self._environment = command, log, {**os.environ, **environment}
        self._back_at = 0.0
        self._expected = False
        self.start()

    def start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._expected = False
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self, back_in_s: float = RESTART_S) -> list[int]:
        """SIGKILL, and a new one after so long; the processes that were killed, none where it was down already."""
        if not self.alive:
            return []
        self._expected, self._back_at = True, time.monotonic() + back_in_s
        self._process.kill()
        self._process.wait()
        return [self.pid]

    def freeze(self) -> bool:
        if self.alive:
            self._process.send_signal(signal.SIGSTOP)
        return self.alive

    def wake(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def look_after(self) -> Exit | None:
        """Start it again when its time has come; tells when it ended by itself."""
        if self.alive:
            return None
        if not self._expected:
            self._expected, self._back_at = True, time.monotonic() + RESTART_S
            return Exit(self.name, self._process.returncode, boottime(), last_lines(self._log))
        if time.monotonic() >= self._back_at:
            self.start()
        return None

    def ask_to_stop(self) -> None:
        self.wake()
        self._process.terminate()

    def stop(self) -> None:
        self.ask_to_stop()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Server:
    """PostgreSQL or Valkey in a folder of its own: `serve` starts it there, on the same port each time."""

    def __init__(self, name: str, folder: Path, serve: Callable[[], AbstractContextManager[str]]) -> None:
        self.name = name
        self._folder, self._serve = folder, serve
        self._back_at: float | None = None
        self._running = ExitStack()
        self.url = self._running.enter_context(serve())

    def kill(self, back_in_s: float = RESTART_S) -> list[int]:
        """SIGKILL to the first and to all that it started: PostgreSQL is many processes."""
        if self._back_at is not None:
            return []
        killed = at_home_in(self._folder)
        for pid in killed:
            send(pid, signal.SIGKILL)
        self._running.close()
        self._back_at = time.monotonic() + back_in_s
        return killed

    def freeze(self) -> bool:
        return any([send(pid, signal.SIGSTOP) for pid in at_home_in(self._folder)])

    def wake(self) -> None:
        for pid in at_home_in(self._folder):
            send(pid, signal.SIGCONT)

    def look_after(self) -> None:
        if self._back_at is not None and time.monotonic() >= self._back_at:
            self._running.enter_context(self._serve())
            self._back_at = None

    def stop(self) -> None:
        self.wake()
        self._running.close()


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def send(pid: int, number: signal.Signals) -> bool:
    """False when it is gone already."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def command_line(pid: int) -> str:
    """Empty for what is gone, or a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def below(pid: int) -> list[int]:
    """Everything that descends from a process, its children first."""
    children: dict[int, list[int]] = {}
    for one, parent in _parents():
        children.setdefault(parent, []).append(one)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def above(pid: int) -> list[int]:
    """Everything that a process descends from, its parent first."""
    parents, found = dict(_parents()), [pid]
    while (parent := parents.get(found[-1], 0)) > 1:
        found.append(parent)
    return found[1:]


def at_home_in(folder: Path) -> list[int]:
    """Living processes whose working folder is this or below it."""
    return [pid for pid, _ in _parents() if _works_in(pid, folder)]


def mentioning(folder: Path) -> dict[int, str]:
    """Living processes that work in a folder, or name it in their command line: all that a storm may leave behind."""
    named = {pid: command_line(pid) for pid, _ in _parents() if pid != os.getpid()}
    return {pid: words for pid, words in named.items() if str(folder) in words or _works_in(pid, folder)}


def _works_in(pid: int, folder: Path) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(folder)
    return False


def _parents() -> Iterator[tuple[int, int]]:
    """Every living process and its parent. A zombie has ended: it only waits to be counted."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                yield int(path.parent.name), int(parent)
