"""How an engine is told its job after it has started, so that nobody waits for its imports.

A worker starts `python -m kdcore run --wait N`, where N is the engine's end of a Unix socket. The engine imports all
that a job may need, says that it is ready, and waits. Then it gets one order: what stands behind `run` on the command
line, where to work, what to add to the environment; and with it three descriptors, for its lines, for what it prints,
and the lock that proves to others that it lives. It does what it would have done by hand, and ends: no process ever
sees a second job.
"""

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

READY = b"\n"
EXIT_STOPPED = os.EX_TEMPFAIL
"""What an engine leaves with that stopped because it was asked to."""
DESCRIPTORS = 3
CHUNK_BYTES = 65536


@dataclass(frozen=True)
class Order:
    """`arguments` are those of `python -m kdcore run`, but for the descriptor of its lines."""

    arguments: Sequence[str]
    folder: str
    environment: Mapping[str, str]


def give(channel: socket.socket, order: Order, *, events: int, log: int, lock: int) -> None:
    """The worker's side. An engine that still imports finds the order when it is ready."""
    message = json.dumps(asdict(order)).encode() + b"\n"
    sent = socket.send_fds(channel, [message], [events, log, lock])
    channel.sendall(message[sent:])


def wait(descriptor: int, prepare: Callable[[], object]) -> list[str]:
    """The engine's side: `prepare`, take the one order, and return the arguments of `run`, complete.

    Leaves the process (SystemExit) where the worker goes away and gives none.
    """
    with socket.socket(fileno=descriptor) as channel:
        prepare()
        with suppress(BrokenPipeError):
            channel.sendall(READY)
        message, descriptors = _receive(channel)
    if not message.endswith(b"\n"):
        sys.exit(0)
    return _install(Order(**json.loads(message)), *descriptors)


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors = b"", []
    while not message.endswith(b"\n"):
        chunk, more, _, _ = socket.recv_fds(channel, CHUNK_BYTES, DESCRIPTORS)
        if not chunk:
            break
        message += chunk
        descriptors += more
    return message, descriptors


def _install(order: Order, events: int, log: int, lock: int) -> list[str]:
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    # Never closed here: the system does, when this process and all that it started have ended.
    os.set_inheritable(lock, True)
    os.chdir(order.folder)
    os.environ.update(order.environment)
    # It may have been asked for already, and remembers what TMPDIR was then.
    tempfile.tempdir = None
    return [*order.arguments, "--events-fd", str(events)]
