"""How fast the service answers while clients misbehave: GET /healthz, on a new connection each time.

    .venv/bin/python -m bench.slow_clients [--only slow streams] [--connections 2000] [--streams 1000] [--seconds 15]
                                           [--url http://127.0.0.1:8000]

    quiet     nobody else
    slow      connections that say nothing, send half a header, or announce a body that never comes; opened anew as soon
              as the server closes one
    headers   eight clients that send header lines for ever
    bodies    four clients that send jobs of 20,000 unknown fields, one after the other
    streams   event streams of a paused job

The clients are a process of their own, the server is `python -m serve` unless a URL is given. The aim is a p99 below
50 ms with slow clients and with streams, on a machine whose cores are free. About two minutes.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from base.processes import raise_descriptor_limit
from bench.processes import REPOSITORY, exit_on_sigterm
from bench.service import embedded
from client.sdk import Distillery

KINDS = ("quiet", "slow", "headers", "bodies", "streams")
AIMS, AIM_MS = ("slow", "streams"), 50
JOB = {"dataset": "digits", "student": "convnet8", "method": "supervised", "training": {"epochs": 100_000}}
SETTLE_S = 3.0
PAUSE_S = 0.02
AT_ONCE = 50
"""Connections that are opened at the same time: the bench is about those that stay, not about the storm."""

Client = Callable[[str, int, asyncio.Semaphore], Awaitable[None]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--url")
    parser.add_argument("--attack", nargs=3, metavar=("KIND", "ADDRESS", "NUMBER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    raise_descriptor_limit()
    if arguments.attack:
        kind, address, number = arguments.attack
        asyncio.run(_attack(kind, address, int(number)))
        return 0
    exit_on_sigterm()
    numbers = {"slow": arguments.connections, "headers": 8, "bodies": 4, "streams": arguments.streams}
    with tempfile.TemporaryDirectory() as folder, _service(arguments.url, Path(folder)) as url:
        slowest = {kind: _measure(kind, url, numbers.get(kind, 0), arguments.seconds) for kind in arguments.only}
    missed = [kind for kind in AIMS if slowest.get(kind, 0) >= AIM_MS]
    print(f"aim: p99 below {AIM_MS} ms with {' and '.join(AIMS)}: {'MISSED' if missed else 'reached'}")
    return int(bool(missed))


@contextlib.contextmanager
def _service(url: str | None, folder: Path) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with embedded(folder) as own:
        yield own


def _measure(kind: str, url: str, number: int, seconds: float) -> float:
    """Print the times of /healthz under one kind of load. Returns the p99 in ms."""
    with contextlib.ExitStack() as stack:
        path = "/"
        if kind == "streams":
            service = stack.enter_context(Distillery(url))
            job = service.submit(JOB)
            service.pause(job["id"])
            stack.callback(service.cancel, job["id"])
            path = f"/v1/jobs/{job['id']}/events/stream"
        if number:
            command = [sys.executable, "-m", "bench.slow_clients", "--attack", kind, url + path, str(number)]
            attack = subprocess.Popen(command, cwd=REPOSITORY)
            stack.callback(attack.wait)
            stack.callback(attack.terminate)
            time.sleep(SETTLE_S)
        times = _answers(url, seconds)
    times.sort()
    p50, p99 = (1000 * times[int(len(times) * part)] for part in (0.5, 0.99))
    print(
        f"{kind:8} {number:5} clients: {len(times)} answers: "
        f"p50 {p50:.1f}, p99 {p99:.1f}, max {1000 * times[-1]:.1f} ms"
    )
    return p99


def _answers(url: str, seconds: float) -> list[float]:
    address = urlsplit(url)
    assert address.hostname is not None
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        times.append(time.perf_counter() - began)
        time.sleep(PAUSE_S)
    return times


async def _attack(kind: str, address: str, number: int) -> None:
    client: Client = {"slow": _slow, "headers": _headers, "bodies": _bodies, "streams": _stream}[kind]
    gate = asyncio.Semaphore(AT_ONCE)
    await asyncio.gather(*(_again(client, address, place, gate) for place in range(number)))


async def _again(client: Client, address: str, place: int, gate: asyncio.Semaphore) -> None:
    while True:
        with contextlib.suppress(OSError, EOFError):
            await client(address, place, gate)
        await asyncio.sleep(PAUSE_S)


@contextlib.asynccontextmanager
async def _connected(address: str, gate: asyncio.Semaphore):  # type: ignore[no-untyped-def]
    parts = urlsplit(address)
    async with gate:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def _slow(address: str, place: int, gate: asyncio.Semaphore) -> None:
    header = b"POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    async with _connected(address, gate) as (reader, writer):
        writer.write((b"", header, header + b"Content-Length: 990000\r\n\r\n" + b" " * 1000)[place % 3])
        await reader.read()


async def _headers(address: str, place: int, gate: asyncio.Semaphore) -> None:
    async with _connected(address, gate) as (_, writer):
        writer.write(b"GET / HTTP/1.1\r\n")
        while True:
            writer.write(b"X-Name: value\r\n" * 5000)
            await writer.drain()


async def _bodies(address: str, place: int, gate: asyncio.Semaphore) -> None:
    body = json.dumps({**JOB, **{f"k{number}": 0 for number in range(20_000)}}).encode()
    async with _connected(address, gate) as (reader, writer):
        while True:
            header = b"POST /v1/jobs/validate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
            writer.write(header + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.partition(b":")[2]))


async def _stream(address: str, place: int, gate: asyncio.Semaphore) -> None:
    path = urlsplit(address).path.encode()
    async with _connected(address, gate) as (reader, writer):
        writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await reader.read()


if __name__ == "__main__":
    sys.exit(main())
