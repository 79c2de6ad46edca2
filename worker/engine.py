"""The engine's process. It is started before a job, gets its order, is read line by line, and its end is classified.

    EngineProcess    the guard and the engine, in a process session of their own
    EngineRun        one engine at work on one job: its lines, its log and its ending
    MemoryWatch      the memory that an engine's processes take
    EnginePool       the engines of a slot, of which one is kept ready

An engine writes JSON lines to a pipe. What it prints goes to the attempt's log file, which outlives both.
"""

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, Self

from base.clock import boottime
from base.memory import session_of, taken_bytes
from base.processes import kill_group
from kdcore.protocol import EXIT_STOPPED, Order, send_order
from worker import guard
from worker.context import WorkerContext
from worker.devices import Device, engine_environment

log = logging.getLogger("distillery.engine")

SAFE_PART = 0.8
"""The guard's deadline as a fraction of a lease: the training ends before another worker may claim the job."""
STARTS_IN_S = 120.0
"""Time limit of an engine's imports, from a disk without cached files."""
BEGINS_IN_S = 5.0
"""Time limit between the order and the first line of an engine that was ready."""
MEMORY_SETTING = "DISTILLERY_ENGINE_MEMORY_BYTES"
LONGEST_LINE_BYTES = 16 * 1024 * 1024
LAST_BYTES = 64 * 1024
LAST_LINES = 20
PIPE_CLOSES_IN_S = 10
"""Time limit for reading the pipe after the engine has ended: a killed process may take a moment to close it."""
LONGEST_PAUSE_S = 1.0
"""More time than this between two polls is a pause of the worker's own, and not counted as the engine's silence."""
LOOK_S = 0.5
"""The time between two looks at an engine's memory."""
LIST_S = 5.0
"""The time between two searches for further processes of an engine."""
ENDS_SOON_S = 0.02
"""The time between two polls of an engine that has closed its pipe."""

CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
"""Signals that a program causes by its own fault."""

Line = dict[str, Any]
How = Literal["done", "error", "stopped", "out_of_memory", "over_memory", "killed", "crashed", "vanished"]
"""`out_of_memory`: the host had no more, or the engine said so; `over_memory`: the engine took more than it may."""


class EngineProcess:
    """A guard and the engine below it, in a session of their own. The engine waits for its order (`kdcore.protocol`).

    `deadline` and every later one are times of `boottime()` at which the guard kills the session. A context manager:
    no process is left at its end.
    """

    def __init__(self, command: Sequence[str], *, deadline: float, environment: Mapping[str, str]) -> None:
        self.started_at = boottime()
        self.deadline = deadline
        self.killed = False
        self.channel, theirs = socket.socketpair()
        # For output before the order, which names the log file.
        self._early_output = TemporaryFile()  # noqa: SIM115 - closed with the process
        deadlines, self._deadlines = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, repr(deadline), "--", *command, "--wait", str(theirs.fileno())],
                stdin=deadlines,
                stdout=self._early_output,
                stderr=self._early_output,
                pass_fds=(theirs.fileno(),),
                env=dict(environment),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self._close_files()
            raise
        finally:
            theirs.close()
            os.close(deadlines)
        # A frozen guard must not block the heartbeat, nor a frozen engine the thread that sends its order.
        os.set_blocking(self._deadlines, False)
        self.channel.settimeout(BEGINS_IN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        self.reap()
        self._close_files()

    @property
    def pid(self) -> int:
        """The guard's process id, which is also the id of the session and of the process group."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """True if the engine has imported everything and waits for its order."""
        return _readable(self.channel.fileno(), timeout_s=0) and not self.has_ended()

    def extend(self, deadline: float) -> None:
        """Set a later deadline. If the pipe is full, the guard still has earlier ones to read."""
        try:
            os.write(self._deadlines, f"{deadline!r}\n".encode())
        except (BlockingIOError, BrokenPipeError):
            return
        self.deadline = deadline

    def request_stop(self) -> None:
        """Send SIGTERM through the guard to the engine: it writes a checkpoint and exits."""
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the whole session."""
        self.killed = True
        self.kill_rest()

    def kill_rest(self) -> None:
        """Send SIGKILL to the remaining processes of an engine that has ended."""
        if self._process.returncode is None:
            kill_group(self.pid)

    def has_ended(self) -> bool:
        """True if the guard has ended. It is not reaped, so that its process group id is not used again."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def reap(self) -> int:
        """Wait for the end. Returns the guard's exit code, which is derived from the engine's."""
        if self._process.returncode is None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            kill_group(self.pid)
        return self._process.wait()

    def early_output(self, since: int = 0) -> bytes:
        """Return the output before the order, and that of the guard, from byte `since` on."""
        descriptor = self._early_output.fileno()
        return os.pread(descriptor, max(0, os.fstat(descriptor).st_size - since), since)

    def _close_files(self) -> None:
        self._early_output.close()
        self.channel.close()
        os.close(self._deadlines)


@dataclass(frozen=True)
class Ending:
    """The end of an engine, observed from outside: its exit code, its last line, and the last lines of its log."""

    how: How
    message: str
    exit_code: int
    last_line: Line | None
    log_tail: list[str]


class EngineRun:
    """The engine of `process` at work on `order`. It prints to `log_path` and holds `lock` until it ends.

    If its processes take more than `most_bytes` of memory, `lines` kills them. A context manager, to be left before its
    process is closed.
    """

    def __init__(
        self, process: EngineProcess, order: Order, *, log_path: Path, lock: int, most_bytes: int | None = None
    ) -> None:
        self.process = process
        self._memory = MemoryWatch(process.pid, most_bytes)
        self.began = False
        """True after the first line. Until then, nothing is lost if the engine ends."""
        self.silent_s = 0.0
        """The time for which the worker has waited for the next line since the last one."""
        self._polled_at = boottime()
        self._log_path = log_path
        self._unfinished = bytearray()
        self._last_line: Line | None = None
        self._oom_kills = _oom_kills()
        self._ending: Ending | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        self._copied_bytes = 0
        self._events, events = os.pipe()
        try:
            self._copy_early_output()
            begins_by = boottime() + BEGINS_IN_S
            self._begins_by = begins_by if process.is_ready else max(begins_by, process.started_at + STARTS_IN_S)
            send_order(process.channel, order, events=events, log=self._log, lock=lock)
        except (BrokenPipeError, ConnectionResetError, TimeoutError) as error:
            # No line follows; `is_overdue` or the exit code then shows the failure.
            log.warning("an engine does not accept its order: %s", error)
        except BaseException:
            self._close()
            raise
        finally:
            os.close(events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def is_overdue(self) -> bool:
        """True if there was no line for so long after the order that the engine must be frozen."""
        return not self.began and boottime() > self._begins_by

    def lines(self, timeout_s: float) -> tuple[list[Line], bool]:
        """Wait at most `timeout_s` for lines. Returns them, and whether more may come."""
        ended = self.process.has_ended()
        if not ended and self._memory.is_over():
            self.process.kill()
        if ended:
            # Remaining child processes of the engine could keep the pipe open for ever.
            self.process.kill_rest()
            timeout_s = PIPE_CLOSES_IN_S
        readable = _readable(self._events, timeout_s)
        chunk = os.read(self._events, 1 << 20) if readable else b""
        self.began = self.began or bool(chunk)
        self._count_silence(bool(chunk))
        if readable and not chunk and not ended:
            time.sleep(ENDS_SOON_S)
        return self._split(chunk), bool(chunk) or not ended

    def _count_silence(self, heard: bool) -> None:
        """Count only the time in which this process has run: one that was frozen finds an engine that was, too."""
        now = boottime()
        self.silent_s = 0.0 if heard else self.silent_s + min(now - self._polled_at, LONGEST_PAUSE_S)
        self._polled_at = now

    def ending(self) -> Ending:
        """Return how the engine ended. Call it after `lines` has returned that no more may come."""
        if self._ending is None:
            code = self.process.reap()
            self._copy_early_output()
            how, message = self._judge(code)
            self._ending = Ending(how, message, code, self._last_line, _last_lines(self._log_path))
        return self._ending

    def _close(self) -> None:
        for descriptor in (self._events, self._log):
            os.close(descriptor)

    def _copy_early_output(self) -> None:
        """Copy to the log the output before the order and that of the guard."""
        output = self.process.early_output(self._copied_bytes)
        self._copied_bytes += len(output)
        os.write(self._log, output)

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
        """Parse one line of the protocol. Any other text is written to the log."""
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
            judged = "vanished", "the engine ended with exit code 0 before its work was done"
        elif code > 0 and last == "error":
            judged = "error", "the engine reported an error"
        elif code == EXIT_STOPPED:
            judged = "stopped", "the engine stopped on request"
        elif number > 0:
            judged = self._judge_signal(number, engine=code > 0)
        elif any("MemoryError" in line or "OutOfMemoryError" in line for line in _last_lines(self._log_path)):
            judged = "out_of_memory", f"the engine ran out of memory (exit code {code})"
        else:
            judged = "crashed", f"the engine ended with exit code {code} and reported no error"
        return judged

    def _judge_signal(self, number: int, engine: bool) -> tuple[How, str]:
        """Classify an end by a signal. `engine`: the signal ended the engine, not the guard."""
        if self._memory.taken_bytes is not None:
            taken, most = (f"{size / 1e9:.1f} GB" for size in (self._memory.taken_bytes, self._memory.most_bytes or 0))
            text = f"the engine took {taken} of memory; it may take {most} here ({MEMORY_SETTING})"
            return "over_memory", text
        if self.process.killed:
            begun = "" if self.began else ", which had not begun"
            return "killed", f"the worker killed the engine{begun}"
        if not engine and boottime() >= self.process.deadline:
            return "killed", "the guard killed the engine because its lease was not extended in time"
        if number == signal.SIGKILL and _oom_kills() > self._oom_kills:
            return "out_of_memory", "the host ran out of memory and the kernel killed the engine"
        which = "the engine" if engine else "the engine's guard"
        if number in CRASHES:
            return "crashed", f"{which} crashed: {signal.Signals(number).name}"
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return "killed", f"{which} was ended by {name}"


class MemoryWatch:
    """Compares the memory that the processes of a session take with a bound, now and then.

    A limit of the kernel's would count what a GPU's driver only reserves. So an engine may be above the bound for
    `LOOK_S`.
    """

    def __init__(self, session: int, most_bytes: int | None) -> None:
        self.most_bytes = most_bytes
        self.taken_bytes: int | None = None
        """What was found above the bound."""
        self._session = session
        self._processes: list[int] = []
        self._looks_at = self._lists_at = 0.0

    def is_over(self) -> bool:
        """Look, if the last look is long enough ago. Returns True if too much is taken."""
        now = boottime()
        if self.most_bytes is None or now < self._looks_at:
            return False
        self._looks_at = now + LOOK_S
        if now >= self._lists_at:
            self._processes, self._lists_at = session_of(self._session), now + LIST_S
        taken = sum(map(taken_bytes, self._processes))
        if taken > self.most_bytes:
            self.taken_bytes = taken
        return taken > self.most_bytes


class EnginePool:
    """The engines of one slot; used by the slot's thread only.

    The import of torch takes seconds. So one engine is started before there is a job, imports, and waits for its order.
    It costs memory meanwhile, but no processor time. One that dies or freezes while it waits is replaced; no job fails.
    """

    def __init__(self, context: WorkerContext, device: Device) -> None:
        self._context, self.device = context, device
        self._ready: EngineProcess | None = None

    @property
    def is_ready(self) -> bool:
        """True if a job would begin at once."""
        return self._ready is not None and self._ready.is_ready

    def refill(self) -> None:
        """Keep one engine ready for most of a lease. Call it again before that time is over."""
        if self._ready is not None and self._ready.has_ended():
            output = self._ready.early_output().decode(errors="replace").strip()
            log.warning("%s: an engine ended while it waited; it printed: %s", self.device.name, output or "nothing")
            self.close()
        deadline = boottime() + SAFE_PART * self._context.settings.lease_s
        if self._ready is not None:
            self._ready.extend(deadline)
        elif self._context.options.warm and not self._context.drain.requested:
            self._ready = self._start_ahead(deadline)

    def take(self) -> EngineProcess | None:
        """Return the engine that is ready, or None. The caller has to close it."""
        process, self._ready = self._ready, None
        if process is not None and process.has_ended():
            process.close()
            return None
        return process

    def start(self, deadline: float) -> EngineProcess:
        """Start another engine; the caller has to close it."""
        allocator = self._context.options.allocator
        environment = engine_environment(self.device, self._context.scratch, allocator=allocator)
        return EngineProcess(self._context.options.engine, deadline=deadline, environment=environment)

    def close(self) -> None:
        """End the engine that is ready."""
        process, self._ready = self._ready, None
        if process is not None:
            process.close()

    def _start_ahead(self, deadline: float) -> EngineProcess | None:
        try:
            return self.start(deadline)
        except OSError as error:
            # The next job tries again, and fails with this error.
            log.warning("%s: no engine can be started ahead: %s", self.device.name, error)
            return None


def _readable(descriptor: int, timeout_s: float) -> bool:
    """Return whether there is data or an end of file to read. `select` would not accept descriptors above 1023."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _last_lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - LAST_BYTES))
        text = file.read().decode(errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]


def _oom_kills() -> int:
    """Return the number of processes that this kernel has killed for lack of memory; 0 if it does not count them."""
    try:
        counters = Path("/proc/vmstat").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in counters.splitlines() if line.startswith("oom_kill ")), 0)
