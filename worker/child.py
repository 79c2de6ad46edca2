"""One engine at work: given its order, heard line by line, and judged by how it ended.

The engine's JSON lines come on a descriptor of their own; whatever it prints goes to the attempt's log file, which
outlives both.
"""

import json
import logging
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from base.clock import boottime
from kdcore.protocol import EXIT_STOPPED, Order, send_order
from worker.session import ANSWERS_IN_S, Session, readable

log = logging.getLogger("distillery.child")

STARTS_IN_S = 120.0
"""How long an engine may take for its imports, on a disk that has never seen them."""
LONGEST_LINE_BYTES = 16 * 1024 * 1024
LAST_BYTES = 64 * 1024
LAST_LINES = 20
ENDING_S = 10
"""How long what is left of a killed session may keep the pipe open before it is let go of."""
ENDS_SOON_S = 0.02
"""Between looks at an engine that has closed its lines."""

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
    """The engine of `session`, at work on `order`. What it prints goes to `log_path`; it holds `lock` until it ends.

    A context manager, within its session's.
    """

    def __init__(self, session: Session, order: Order, *, log_path: Path, lock: int) -> None:
        self.session = session
        self.began = False
        """Whether it has said anything: until then nothing is lost with it."""
        self._log_path = log_path
        self._unfinished = bytearray()
        self._last_line: Line | None = None
        self._oom_kills = _oom_kills()
        self._ending: Ending | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        self._printed = 0
        self._events, events = os.pipe()
        try:
            self._log_what_was_printed()
            answers_by = boottime() + ANSWERS_IN_S
            self._begins_by = answers_by if session.is_ready else max(answers_by, session.started_at + STARTS_IN_S)
            send_order(session.channel, order, events=events, log=self._log, lock=lock)
        except (BrokenPipeError, ConnectionResetError, TimeoutError) as error:
            # It shows: the engine does not begin.
            log.warning("an engine does not take its order: %s", error)
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
        """Whether it has had its order for so long without a word that it must be frozen."""
        return not self.began and boottime() > self._begins_by

    def lines(self, timeout_s: float) -> tuple[list[Line], bool]:
        """The lines that came within `timeout_s`, at once when there are any; and whether more may come."""
        ended = self.session.has_ended()
        if ended:
            # What the engine left behind could keep the pipe open for ever.
            self.session.kill_rest()
            timeout_s = ENDING_S
        heard = readable(self._events, timeout_s)
        chunk = os.read(self._events, 1 << 20) if heard else b""
        self.began = self.began or bool(chunk)
        if heard and not chunk and not ended:
            time.sleep(ENDS_SOON_S)
        return self._split(chunk), bool(chunk) or not ended

    def ending(self) -> Ending:
        """How it ended. To be asked when `lines` has said that no more may come."""
        if self._ending is None:
            code = self.session.reap()
            self._log_what_was_printed()
            how, message = self._judge(code)
            self._ending = Ending(how, message, code, self._last_line, _last_lines(self._log_path))
        return self._ending

    def _close(self) -> None:
        for descriptor in (self._events, self._log):
            os.close(descriptor)

    def _log_what_was_printed(self) -> None:
        """Where a log was not there yet: before the order, and by the guard."""
        printed = self.session.printed(self._printed)
        self._printed += len(printed)
        os.write(self._log, printed)

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
            judged = self._judge_signal(number, by_guard=code > 0)
        elif any("MemoryError" in line or "OutOfMemoryError" in line for line in _last_lines(self._log_path)):
            judged = "out_of_memory", f"the engine ran out of memory (exit code {code})"
        else:
            judged = "crashed", f"the engine left with exit code {code} and named no reason"
        return judged

    def _judge_signal(self, number: int, by_guard: bool) -> tuple[How, str]:
        """`by_guard`: it is the engine that the signal ended, as its guard tells; else it is the guard."""
        if self.session.killed:
            begun = "" if self.began else ", which had not begun"
            return "killed", f"the worker ended the engine{begun}"
        if not by_guard and boottime() >= self.session.deadline:
            return "killed", "the engine was frozen, or cut off past its lease, and its guard ended it"
        if number == signal.SIGKILL and _oom_kills() > self._oom_kills:
            return "out_of_memory", "the host ran out of memory and the kernel ended the engine"
        who = "the engine" if by_guard else "the engine's guard"
        if number in CRASHES:
            return "crashed", f"{who} crashed: {signal.Signals(number).name}"
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return "killed", f"{who} was ended by {name}"


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
