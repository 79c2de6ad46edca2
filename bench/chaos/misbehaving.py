"""Clients that misbehave while faults are injected: slow, cut off, hostile. None may cost a job, or be answered 500.

Each habit has a thread, which repeats it until the end. What is sent does not depend on the seed's plan of faults. None
submits a valid job: the checks count every job.
"""

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PAUSE_S = 0.3
TIMEOUT_S = 5.0
DRIP_S = 0.05
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: close by RST."""
MANY = {f"field{number}": number for number in range(3_000)}
VALID = {"dataset": "digits", "student": "convnet4", "method": "supervised"}
HOSTILE: Sequence[bytes] = (
    json.dumps(MANY).encode(),
    b"[" * 50_000,
    b'{"dataset": "\\u0000", "student": "\\ud800", "method": "\\u001b[2J"}',
    b'{"training": {"epochs": 1e999, "learning_rate": NaN}}',
    json.dumps({**VALID, "name": "x" * 500_000}).encode(),
    json.dumps({**VALID, "student": "timm/" + "a" * 90_000}).encode(),
    b"\xff\xfe not UTF-8",
)


@dataclass
class Misbehaving:
    """The clients. `answers` counts statuses by habit; a request without an answer counts as `none`."""

    urls: Sequence[str]
    seed: int
    answers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        for name, habit in HABITS.items():
            chosen = random.Random(f"{self.seed} {name}")  # noqa: S311 - a draw that can be repeated
            thread = threading.Thread(target=self._repeat, args=(name, habit, chosen), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, name: str, habit: "Habit", chosen: random.Random) -> None:
        while not self._closed.wait(PAUSE_S):
            # The servers are killed meanwhile.
            status = "none"
            with contextlib.suppress(OSError):
                status = habit(urlsplit(chosen.choice(list(self.urls))).netloc, chosen) or "none"
            with self._lock:
                self.answers[name, status] += 1


Habit = Callable[[str, random.Random], str | None]
"""Does something bad to a server once. Returns the status of the answer, if there was one."""


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=TIMEOUT_S)


def _status(connection: socket.socket) -> str | None:
    line = connection.recv(65_536).split(b"\r\n", 1)[0].split()
    return line[1].decode("latin-1") if len(line) > 1 and line[0].startswith(b"HTTP/") else None


def _head(address: str, method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {address}", *lines, "", ""]).encode()


def slow_header(address: str, chosen: random.Random) -> str | None:
    """One byte after another, and never the end."""
    with _connect(address) as connection:
        for byte in _head(address, "GET", "/v1/jobs")[:40]:
            connection.send(bytes([byte]))
            time.sleep(DRIP_S)
    return None


def half_body(address: str, chosen: random.Random) -> str | None:
    """A body that breaks off by RST."""
    path = chosen.choice(["/v1/jobs", "/v1/models", "/v1/uploads", "/v1/jobs/validate"])
    connection = _connect(address)
    connection.sendall(_head(address, "POST", path, "Content-Type: application/json", "Content-Length: 100000"))
    connection.sendall(b'{"dataset": "dig' * chosen.randint(1, 1_000))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.close()
    return None


def hostile_body(address: str, chosen: random.Random) -> str | None:
    """A body that no schema takes."""
    body, path = chosen.choice(HOSTILE), chosen.choice(["/v1/jobs", "/v1/models", "/v1/datasets", "/v1/jobs/validate"])
    with _connect(address) as connection:
        length = f"Content-Length: {len(body)}"
        connection.sendall(_head(address, "POST", path, "Content-Type: application/json", length) + body)
        return _status(connection)


def hostile_address(address: str, chosen: random.Random) -> str | None:
    """An address, a parameter or a header that no column holds."""
    path = chosen.choice(
        ["/v1/jobs/%00", "/v1/jobs?after=%00%1b", f"/v1/jobs/{'a' * 5_000}", "/v1/jobs/job_1/events?after=1" + "0" * 30]
    )
    with _connect(address) as connection:
        connection.sendall(_head(address, "GET", path, "X-Request-Id: \x01", "Range: items=0-5"))
        return _status(connection)


def many_headers(address: str, chosen: random.Random) -> str | None:
    """More headers than anybody needs."""
    with _connect(address) as connection:
        connection.sendall(_head(address, "GET", "/healthz", *(f"X-{n}: {'y' * 100}" for n in range(2_000))))
        return _status(connection)


def lying_upload(address: str, chosen: random.Random) -> str | None:
    """Bytes that are not those that were announced."""
    body = chosen.randbytes(20_000)
    with _connect(address) as connection:
        path = f"/v1/uploads?sha256={'0' * 64}"
        connection.sendall(_head(address, "POST", path, f"Content-Length: {len(body)}") + body)
        return _status(connection)


def lost_stream(address: str, chosen: random.Random) -> str | None:
    """A request whose sender goes away without the answer."""
    with _connect(address) as connection:
        connection.sendall(_head(address, "GET", "/v1/jobs?limit=100") * 20)
    return None


HABITS: dict[str, Habit] = {
    habit.__name__: habit
    for habit in (slow_header, half_body, hostile_body, hostile_address, many_headers, lying_upload, lost_stream)
}
