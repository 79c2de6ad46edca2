"""One engine process: started through the guard, heard line by line, stopped, and always reaped.

The engine's JSON lines come on a descriptor of their own; whatever it prints goes to the attempt's log file, which
outlives both. A child is used as a context manager: leaving the block leaves no process of its session behind.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from worker import guard

EXIT_STOPPED = os.EX_TEMPFAIL
LONGEST_LINE_BYTES = 16 * 1024 * 1024
LAST_BYTES = 64 * 1024
LAST_LINES = 20
ENDING_S = 10
"""How long what is left of a killed session may keep the pipe open before it is let go of."""

CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
"""Signals that a program brings upon itself."""

Line = dict[str, Any]
How = Literal["done", "error", "stopped", "out_of_memory", "killed", "crashed", "vanished"]


@dataclass(frozen=True)
class Ending:
    """How a child ended, seen from outside: its exit, its last line, and the last of its log."""

    how: How
    message: str
    exit_code: int
    last_line: Line | None
    log_tail: list[str]


class Child:
    """A running engine. `deadline` and every `tick` are times of `boottime()` past which the guard kills it."""

    def __init__(
        self, command: Sequence[str], *, log_path: Path, deadline: float, environment: Mapping[str, str], folder: Path
    ) -> None:
        self._log_path = log_path
        self._unfinished = bytearray()
        self._last_line: Line | None = None
        self._oom_kills = _oom_kills()
        self._ending: Ending | None = None
        self._killed = False
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        self._events, events = os.pipe()
        ticks, self._ticks = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, repr(deadline), "--", *command, "--events-fd", str(events)],
                stdin=ticks,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(events,),
                env=dict(environment),
                cwd=folder,
                start_new_session=True,
            )
        except BaseException:
            self._close()
            raise
        finally:
            os.close(events)
            os.close(ticks)
        # A frozen guard must not freeze the heartbeat with it.
        os.set_blocking(self._ticks, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._reap()
        self._close()

    @property
    def pid(self) -> int:
        """The guard's process id, which is also its session and its process group."""
        return self._process.pid

    def tick(self, deadline: float) -> None:
        """Let the training go on until `deadline`. A full pipe means that the guard has plenty to read already."""
        try:
            os.write(self._ticks, f"{deadline!r}\n".encode())
        except (BlockingIOError, BrokenPipeError):
            return

    def ask_to_stop(self) -> None:
        """SIGTERM to the engine, by way of the guard: it writes a checkpoint and leaves."""
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the whole session."""
        self._killed = True
        if self._process.returncode is None:
            _kill_group(self.pid)

    def lines(self, timeout_s: float) -> tuple[list[Line], bool]:
        """The lines that came within `timeout_s`, at once when there are any; and whether more may come."""
        ended = self._has_ended()
        if ended:
            # What the engine left behind could keep the pipe open for ever.
            _kill_group(self.pid)
            timeout_s = ENDING_S
        readable, _, _ = select.select([self._events], [], [], timeout_s)
        chunk = os.read(self._events, 1 << 20) if readable else b""
        lines = self._split(chunk)
        return lines, bool(chunk) or not ended

    def ending(self) -> Ending:
        """How it ended. To be asked when `lines` has said that no more may come."""
        if self._ending is None:
            code = self._reap()
            how, message = self._judge(code)
            self._ending = Ending(how, message, code, self._last_line, _last_lines(self._log_path))
        return self._ending

    def _has_ended(self) -> bool:
        """Without reaping: until then the process group's number cannot go to anybody else."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _reap(self) -> int:
        if self._process.returncode is None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            _kill_group(self.pid)
        return self._process.wait()

    def _close(self) -> None:
        for descriptor in (self._ticks, self._events, self._log):
            os.close(descriptor)

    def _split(self, chunk: bytes) -> list[Line]:
        self._unfinished += chunk
        *whole, rest = self._unfinished.split(b"\n")
        if len(rest) > LONGEST_LINE_BYTES:
            whole, rest = [*whole, rest], bytearray()
        self._unfinished = rest
        lines = [line for text in whole if (line := self._parse(bytes(text))) is not None]
        if lines:
            self._last_line = lines[-1]
        return lines

    def _parse(self, text: bytes) -> Line | None:
        """One line of the protocol; anything else is log, and goes there."""
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("event"), str):
            return line
        os.write(self._log, text[:LAST_BYTES] + b"\n")
        return None

    def _judge(self, code: int) -> tuple[How, str]:
        last = self._last_line["event"] if self._last_line else None
        number = code - 128 if code > 128 else -code
        if code == 0 and last == "done":
            judged: tuple[How, str] = "done", "the engine is done"
        elif code == 0:
            judged = "vanished", "the engine left with exit code 0 before its work was done"
        elif code > 0 and last == "error":
            judged = "error", "the engine says what is wrong"
        elif code == EXIT_STOPPED:
            judged = "stopped", "the engine stopped because it was asked to"
        elif number > 0:
            judged = self._judge_signal(number)
        elif any("MemoryError" in line or "OutOfMemoryError" in line for line in _last_lines(self._log_path)):
            judged = "out_of_memory", f"the engine ran out of memory (exit code {code})"
        else:
            judged = "crashed", f"the engine left with exit code {code} and named no reason"
        return judged

    def _judge_signal(self, number: int) -> tuple[How, str]:
        if self._killed:
            return "killed", "the worker ended the engine"
        if number == signal.SIGKILL and _oom_kills() > self._oom_kills:
            return "out_of_memory", "the host ran out of memory and the kernel ended the engine"
        if number in CRASHES:
            return "crashed", f"the engine crashed: {signal.Signals(number).name}"
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return "killed", f"the engine was ended by {name}"


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _last_lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def _oom_kills() -> int:
    """How many processes this kernel has ended for want of memory; 0 where it does not say."""
    try:
        counters = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counters.splitlines() if line.startswith("oom_kill ")), 0)
