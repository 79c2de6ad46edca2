"""The contract between the engine's process and the program that starts it: one order in, JSON lines out. No torch.

A worker starts `python -m kdcore run --wait N` before it has a job; N is the engine's end of a Unix socket. The engine
imports what any job may need, sends READY and waits. The order is one JSON line: the arguments of `run`, the folder to
work in, and variables to add to the environment. Three descriptors come with it: for the JSON lines, for everything
else that is printed, and a lock that other processes can test to see whether the engine still runs. The engine then
runs this one job and exits; no process runs two.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from base.warning import WarningItem

PROGRESS_EVERY_S = 1.0
SIGN_EVERY_S = 10.0
"""The time between two signs of an engine at work that no progress counts."""
READY = b"\n"
EXIT_STOPPED = os.EX_TEMPFAIL
"""Exit code of an engine that was stopped by SIGTERM and has saved a checkpoint."""
DESCRIPTORS = 3
CHUNK_BYTES = 65536
REPORT_OF_ATTEMPTS = ("seconds", "cost", "timings", "teacher_cache", "kept_logits", "files", "quantization")
"""The fields of a report that say how its attempts went. All others are equal in two runs of the same bits."""
FILES_OF_ATTEMPTS = ("report.json", "report.html", "model_card.zip")
"""The files that hold such fields. All others have the same bytes in two runs of the same bits."""

CHECKPOINTS_KEPT = 2
"""The engine keeps so many files in its folder, and the worker so many of a job: if one is damaged, another is left."""


@dataclass(frozen=True)
class KnownBefore:
    """What the service knows about a job before its engine starts: the file of `--known`."""

    warnings: Sequence[WarningItem] = ()
    """Found at registration, at submit and by earlier attempts; the report lists them, too."""
    teacher_check: Mapping[str, Any] | None = None
    """The result of an earlier check of the same teacher on the same data."""

    @classmethod
    def read(cls, path: Path) -> KnownBefore:
        content = json.loads(path.read_text())
        return cls([WarningItem(**one) for one in content["warnings"]], content["teacher_check"])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


NOTHING_KNOWN = KnownBefore()


class Lines:
    """Writes events to a stream, one JSON object per line. `progress_is_due` limits progress to once a second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_progress = float("-inf")
        self._last_sign = time.monotonic()

    def emit(self, event: str, **fields: Any) -> None:
        self._stream.write(json.dumps({"event": event, **fields}, allow_nan=False) + "\n")
        self._stream.flush()

    def phase(self, phase: str) -> None:
        self.emit("phase", phase=phase)

    def progress_is_due(self) -> bool:
        return time.monotonic() - self._last_progress >= PROGRESS_EVERY_S

    def working(self, done: int, total: int) -> None:
        """Say from time to time that the engine goes on with something that is no part of the progress, such as the
        decoding of a data set: an engine that prints nothing for long is stopped."""
        if self._sign_is_due():
            self.emit("working", done=done, total=total)

    def waiting(self) -> None:
        """Say from time to time that the engine waits for another process of the host."""
        if self._sign_is_due():
            self.emit("waiting")

    def _sign_is_due(self) -> bool:
        due = time.monotonic() - self._last_sign >= SIGN_EVERY_S
        if due:
            self._last_sign = time.monotonic()
        return due

    def progress(self, **fields: Any) -> None:
        self._last_progress = time.monotonic()
        self.emit("progress", **fields)

    def metric(self, trial: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.emit("metric", trial=trial, step=step, epoch=epoch, values=dict(values))

    def warning(self, warning: WarningItem) -> None:
        self.emit("warning", **warning.as_dict())


@dataclass(frozen=True)
class Order:
    """One job for a waiting engine. `arguments` are those of `python -m kdcore run`, without `--events-fd`."""

    arguments: Sequence[str]
    folder: str
    environment: Mapping[str, str]


def send_order(channel: socket.socket, order: Order, *, events: int, log: int, lock: int) -> None:
    """Send the order and its descriptors (the worker's side). The engine may still be importing."""
    message = json.dumps(asdict(order)).encode() + b"\n"
    sent = socket.send_fds(channel, [message], [events, log, lock])
    if sent < len(message):  # An engine that has its whole order closes its end: even an empty send would fail.
        channel.sendall(message[sent:])


def receive_order(descriptor: int, prepare: Callable[[], object]) -> list[str]:
    """Call `prepare`, wait for the order, and return the complete arguments of `run` (the engine's side).

    Exits (SystemExit 0) if the worker closes the socket without an order.
    """
    with socket.socket(fileno=descriptor) as channel:
        prepare()
        with suppress(BrokenPipeError):
            channel.sendall(READY)
        message, descriptors = b"", list[int]()
        while not message.endswith(b"\n"):
            chunk, more, _, _ = socket.recv_fds(channel, CHUNK_BYTES, DESCRIPTORS)
            if not chunk:
                sys.exit(0)
            message += chunk
            descriptors += more
    return _apply(Order(**json.loads(message)), *descriptors)


def _apply(order: Order, events: int, log: int, lock: int) -> list[str]:
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    # Never closed here: the system closes it when this process and all its children have ended.
    os.set_inheritable(lock, True)
    os.chdir(order.folder)
    os.environ.update(order.environment)
    # An import may have called gettempdir(), which caches the TMPDIR of that time.
    tempfile.tempdir = None
    return [*order.arguments, "--events-fd", str(events)]
