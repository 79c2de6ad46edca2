"""How fast the API answers, beside a bare route: one FastAPI route under uvicorn's defaults that reads the same row.

    .venv/bin/python -m bench.api [--databases sqlite postgres] [--jobs 1 100000] [--smoke]

For each database and number of jobs the embedded server runs, and trains a job. Contestants take turns, so that what
else the machine does meets all of them; the ratio of the medians counts, not the rates. `poll` is GET of the job that
trains, `poll, 304` with the ETag of its last answer, `ended` GET of a job that has ended, `list` the newest 20 jobs,
`no match` a list by a label that no job has, `submit` a POST. `poll, with streams` is asked while clients follow the
job's events. Polls come over 16 connections, each of which sends its next one when it has the answer; lists and submits
over one, so that their time is that of one answer.

`--smoke`: one job, SQLite, no training, a fraction of a second each.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI
from sqlalchemy import insert

from bench.processes import Program, exit_on_sigterm, wait_until
from bench.service import embedded, open_folder, running_server
from client.sdk import Distillery
from kdcore.spec.job import JobSpec
from store.database import Database, migrate
from store.lists import facets_of, figures_of, summary_of
from store.records import new_id
from store.tables import job_facets, jobs

CONNECTIONS = 16
SPEC = {"dataset": "digits", "student": "convnet4", "method": "supervised", "training": {"epochs": 100_000, "seed": 0}}
PAUSED = {**SPEC, "scheduling": {"priority": -100}}
AIMS = "aims: poll at least 0.8 of the bare route, lists below 10 ms"


# ── the bare route ──


def bare(url: str) -> FastAPI:
    """Return the bare application for a database."""
    app = FastAPI()
    if url.startswith("sqlite"):
        import sqlite3

        connection = sqlite3.connect(url.removeprefix("sqlite:///"), check_same_thread=False)
        connection.row_factory = sqlite3.Row

        @app.get("/jobs/{job_id}")
        async def read(job_id: str) -> dict[str, object]:
            return dict(connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone())

        return app
    import asyncpg

    pool = None

    @app.get("/jobs/{job_id}")
    async def read_from_postgres(job_id: str) -> dict[str, object]:
        nonlocal pool
        if pool is None:
            pool = await asyncpg.create_pool(url, min_size=10, max_size=10)
        return dict(await pool.fetchrow("SELECT * FROM jobs WHERE id = $1", job_id))

    return app


# ── load ──


@dataclass(frozen=True)
class Load:
    """The answers to a load: how many a second, and after how many seconds."""

    rate: float
    waits: list[float]
    refused: int = 0
    """Answers with another status than the expected one, which are not in the rate."""

    def within(self, share: float) -> float:
        return sorted(self.waits)[max(0, math.ceil(share * len(self.waits)) - 1)]


class _Client(asyncio.Protocol):
    """One connection that sends the same request again and again."""

    def __init__(self, request: Callable[[], bytes], expected: int) -> None:
        self.request, self.expected = request, f"HTTP/1.1 {expected} ".encode()
        self.waits: list[float] = []
        self.refused: list[bytes] = []
        self.ended = asyncio.get_running_loop().create_future()
        self.stopping = False
        self._buffer, self._length = b"", -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self.transport.write(self.request())

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._length < 0:
            head, end, _ = self._buffer.partition(b"\r\n\r\n")
            if not end:
                return
            self._is_expected = head.startswith(self.expected)
            lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
            length = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
            self._length = len(head) + 4 + length
        if len(self._buffer) < self._length:
            return
        answer, self._buffer, self._length = self._buffer, b"", -1
        if self._is_expected:
            self.waits.append(time.perf_counter() - self._sent_at)
        else:
            self.refused.append(answer)
        if self.stopping:
            self.transport.close()
            self.ended.set_result(None)
        else:
            self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(SystemExit(f"the connection was cut: {error}"))


def request(url: str, method: str = "GET", body: object = None, **headers: str) -> bytes:
    """Return the bytes of a request."""
    parts = urlsplit(url)
    content = b"" if body is None else json.dumps(body).encode()
    sent = {"Host": parts.netloc, **({"Content-Type": "application/json"} if content else {}), **headers}
    if content:
        sent["Content-Length"] = str(len(content))
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in sent.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + content


async def _load(
    address: tuple[str, int], make: Callable[[], bytes], seconds: float, expected: int, connections: int = CONNECTIONS
) -> Load:
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    opening = [loop.create_connection(lambda: _Client(make, expected), *address) for _ in range(connections)]
    clients = [client for _, client in await asyncio.gather(*opening)]
    await asyncio.sleep(seconds)
    for client in clients:
        client.stopping = True
    await asyncio.gather(*(client.ended for client in clients))
    waits = [wait for client in clients for wait in client.waits]
    refused = [answer for client in clients for answer in client.refused]
    if not waits:
        raise SystemExit(f"every answer was like {refused[0][:600]!r}")
    return Load(len(waits) / (time.perf_counter() - began), waits, len(refused))


def load(url: str, seconds: float, expected: int = 200, connections: int = CONNECTIONS, **sent: object) -> Load:
    """Return the load of one request, repeated."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    once = request(url, **sent)  # type: ignore[arg-type]
    return asyncio.run(_load((parts.hostname, parts.port), lambda: once, seconds, expected, connections))


def by_turns(contestants: Mapping[str, Callable[[], Load]], turns: int) -> dict[str, list[Load]]:
    """Return the loads of each contestant, which take turns."""
    found: dict[str, list[Load]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, measure in contestants.items():
            found[name].append(measure())
    return found


# ── what is measured ──


def fill(url: str, count: int) -> None:
    """Insert jobs that have ended, each with labels, a report and specs of the usual size."""
    database = Database(url)
    spec = {**SPEC, "labels": {"team": "vision"}}
    resolved = JobSpec.model_validate(spec).as_json()
    result = {"student": {"accuracy": 0.9, "parameters": 3_000, "bytes": 12_000}, "notes": "x" * 2000}
    now = time.time() - count
    with database.begin() as connection:
        for start in range(0, count, 1000):
            rows, facets = [], []
            for number in range(start, min(count, start + 1000)):
                labels = {"team": ("vision", "speech")[number % 2], "run": str(number // 100)}
                row = {
                    **{"id": new_id("job"), "project": "default", "name": f"job {number}", "method": "supervised"},
                    **{"spec": {**spec, "labels": labels}, "resolved_spec": resolved, "spec_sha256": "0" * 64},
                    **{"status": "failed" if number % 10 == 0 else "succeeded", "max_attempts": 3, "event_seq": 0},
                    **{"created_at": now + number, "started_at": now + number, "finished_at": now + number + 60},
                    **{"labels": labels, "summary": summary_of(spec, resolved), "figures": figures_of(result)},
                    **{"result": result, "accuracy": 0.9},
                }
                rows.append(row)
                found = facets_of(spec, resolved) | {(f"label.{name}", value) for name, value in labels.items()}
                facets += [
                    {"project": "default", "facet": facet, "value": value, "id": row["id"]} for facet, value in found
                ]
            connection.execute(insert(jobs), rows)
            connection.execute(insert(job_facets), facets)
        connection.exec_driver_sql("ANALYZE")
    database.dispose()


@contextlib.contextmanager
def bare_server(database_url: str, folder: Path) -> Iterator[str]:
    """Run the bare route as a process of its own. Yields its URL."""
    ready_file = folder / "bare.json"
    command = ["bench.api", "--bare", database_url, "--ready-file", str(ready_file)]
    program = Program("bare", command, folder / "bare.log", {})
    try:
        yield program.wait_for_url(ready_file)
    finally:
        program.stop()


def serve_bare(database_url: str, ready_file: Path) -> None:
    """Serve the bare route until a signal, with uvicorn's defaults."""
    config = uvicorn.Config(bare(database_url), port=0)

    def announce(url: str) -> None:
        ready_file.write_text(json.dumps({"url": url}))

    class Announced(uvicorn.Server):
        async def startup(self, sockets: object = None) -> None:
            await super().startup()
            port = self.servers[0].sockets[0].getsockname()[1]
            announce(f"http://127.0.0.1:{port}")

    Announced(config).run()


async def _open_streams(url: str, count: int) -> list[asyncio.StreamWriter]:
    parts = urlsplit(url)
    opened = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(request(url))
        await reader.readuntil(b"retry: ")
        opened.append(writer)
    return opened


def with_streams(stream_url: str, count: int, poll_url: str, seconds: float) -> Load:
    """Return the load of polls while so many clients follow a job's events."""

    async def run() -> Load:
        opened = await _open_streams(stream_url, count)
        parts = urlsplit(poll_url)
        assert parts.hostname is not None and parts.port is not None
        once = request(poll_url)
        try:
            return await _load((parts.hostname, parts.port), lambda: once, seconds, 200)
        finally:
            for writer in opened:
                writer.close()

    return asyncio.run(run())


def measure(folder: Path, database: str, count: int, *, streams: int, seconds: float, turns: int, trains: bool) -> None:
    """Print the figures for a database with so many jobs."""
    with contextlib.ExitStack() as running:
        url = f"sqlite:///{folder / 'home' / 'distillery.db'}"
        if database == "postgres":
            url = running.enter_context(running_server("postgres", folder / "postgres")).url
        migrate(url)
        fill(url, max(0, count - 1))
        service = running.enter_context(embedded(folder, DISTILLERY_DATABASE_URL=url, OMP_NUM_THREADS="1"))
        plain = running.enter_context(bare_server(url, folder))
        with Distillery(service) as client:
            job = client.submit(SPEC)["id"] if trains else client.submit(PAUSED)["id"]
            if trains:
                wait_until(lambda: client.job(job)["phase"] == "training", "the job to train", 60)
            else:
                client.pause(job)
                wait_until(lambda: client.job(job)["status"] == "paused", "the job to stop", 60)
            ended = next(client.jobs(status="succeeded"), None)
            here = f"{service}/v1/jobs"
            tag = client.connection.request("GET", f"/v1/jobs/{job}").headers["etag"]
            contestants = {
                "bare": lambda: load(f"{plain}/jobs/{job}", seconds),
                "poll": lambda: load(f"{here}/{job}", seconds),
                # While the job trains, its progress changes every second, and with it the tag.
                **({} if trains else {"poll, 304": lambda: load(f"{here}/{job}", seconds, 304, If_None_Match=tag)}),
                **({"ended": lambda: load(f"{here}/{ended['id']}", seconds)} if ended else {}),
                "bare, one at a time": lambda: load(f"{plain}/jobs/{job}", seconds, connections=1),
                "list": lambda: load(f"{here}?limit=20", seconds, connections=1),
                "no match": lambda: load(f"{here}?labels=team:nobody", seconds, connections=1),
                "two filters": lambda: load(f"{here}?status=failed&labels=team:vision", seconds, connections=1),
                "submit": lambda: load(here, seconds, 201, connections=1, method="POST", body=PAUSED),
            }
            stream = f"{here}/{job}/events/stream?after=1000000"
            if streams:
                name = f"poll, {streams:,} streams"
                contestants[name] = lambda: with_streams(stream, streams, f"{here}/{job}", seconds)
            _print(f"{database}, {count:,} job{'s' * (count > 1)}", by_turns(contestants, turns))
            client.cancel(job)


def _print(title: str, loads: Mapping[str, Sequence[Load]]) -> None:
    bare_rate = statistics.median(load.rate for load in loads["bare"])
    print(f"\n{title}\n{'':22}{'a second':>10}{'of bare':>9}{'p50':>10}{'p99':>10}", flush=True)
    for name, of_turns in loads.items():
        rate = statistics.median(load.rate for load in of_turns)
        waits = [statistics.median(load.within(share) for load in of_turns) for share in (0.5, 0.99)]
        shown = "".join(f"{1000 * wait:>7.1f} ms" for wait in waits)
        refused = sum(load.refused for load in of_turns)
        note = f"  {refused} refused" if refused else ""
        print(f"{name:22}{rate:>10,.0f}{rate / bare_rate:>9.2f}{shown}{note}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.api", description="The API beside a bare route.")
    parser.add_argument("--databases", nargs="+", choices=["sqlite", "postgres"], default=["sqlite", "postgres"])
    parser.add_argument("--jobs", nargs="+", type=int, default=[1, 100_000])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one job, SQLite, no training")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--ready-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        serve_bare(arguments.bare, arguments.ready_file)
        return 0
    exit_on_sigterm()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asked = [(database, count) for database in arguments.databases for count in arguments.jobs]
    options = {"streams": arguments.streams, "seconds": arguments.seconds, "turns": arguments.turns, "trains": True}
    if arguments.smoke:
        asked, options = [("sqlite", 2)], {"streams": 5, "seconds": 0.1, "turns": 1, "trains": False}
    for database, count in asked:
        with tempfile.TemporaryDirectory(prefix="distillery-api-") as name:
            folder = Path(name)
            open_folder(folder)
            measure(folder, database, count, **options)
    print(f"\n{AIMS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
