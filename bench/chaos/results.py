"""The results of a run, read from outside: rows by our own SQL, files by our own hashing, and the recorded steps.

Nothing here uses the code under test. Results are plain data, so that the checks can be tested.
"""

import contextlib
import fcntl
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from bench.chaos.clients import Answer
from bench.chaos.injector import Injection
from bench.chaos.plan import PlannedJob
from bench.processes import UnexpectedExit, processes_in, processes_using

TEMPORARY = ".tmp"
SQLITE = "sqlite:///"
DOCUMENTS = ("spec", "resolved_spec", "progress", "warnings", "teacher_check", "result", "error", "data")

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A step that an engine has begun."""

    at: float
    """In seconds of `boottime()`."""
    job: str
    fence: int
    process: int
    step: int


@dataclass(frozen=True)
class File:
    path: str
    """Relative to the file store."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rows:
    jobs: list[Row]
    events: list[Row]
    attempts: list[Row]
    checkpoints: list[Row]
    artifacts: list[Row]
    metrics: list[Row]


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of the same spec: digests of its files, points of its metrics, its report."""

    files: dict[str, str]
    points: dict[tuple[str, str, int], float | None]
    report: Row


@dataclass(frozen=True)
class Leftovers:
    """Whatever remains after all programs have been stopped."""

    processes: list[str]
    locks: list[str]
    files: list[str]


@dataclass(frozen=True)
class Results:
    jobs: Sequence[PlannedJob]
    answers: Sequence[Answer]
    rows: Rows
    files: dict[str, File]
    """By path."""
    steps: list[Step]
    references: dict[str, Reference]
    """By recipe."""
    injections: Sequence[Injection]
    exits: Sequence[UnexpectedExit]
    leftovers: Leftovers
    broker_unreachable: int = 0
    misbehaved: Mapping[str, int] = field(default_factory=dict)
    """The requests of clients that misbehaved, by habit and status."""


def read_rows(url: str) -> Rows:
    with _connection(url) as select:
        return Rows(
            jobs=select("SELECT * FROM jobs ORDER BY id"),
            events=select("SELECT * FROM job_events ORDER BY job_id, seq"),
            attempts=select("SELECT * FROM job_attempts ORDER BY job_id, fence"),
            checkpoints=select("SELECT * FROM checkpoints ORDER BY job_id, fence, step"),
            artifacts=select("SELECT * FROM artifacts ORDER BY job_id, name"),
            metrics=select("SELECT * FROM metrics ORDER BY job_id, trial, key, step"),
        )


@contextlib.contextmanager
def _connection(url: str) -> Iterator[Any]:
    """A function that runs a query and returns rows with decoded documents."""
    if url.startswith(SQLITE):
        with contextlib.closing(sqlite3.connect(url.removeprefix(SQLITE))) as connection:
            connection.row_factory = sqlite3.Row
            yield lambda sql: [_decoded(dict(row)) for row in connection.execute(sql)]
    else:
        with psycopg.connect(url, row_factory=dict_row) as connection:
            yield lambda sql: connection.execute(sql).fetchall()


def _decoded(row: Row) -> Row:
    return {name: json.loads(value) if name in DOCUMENTS and value else value for name, value in row.items()}


def read_files(store: Path) -> dict[str, File]:
    """Hash every file below a folder."""
    files = {}
    for path in sorted(store.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            name = path.relative_to(store).as_posix()
            files[name] = File(name, len(content), hashlib.sha256(content).hexdigest())
    return files


def read_steps(records: Path) -> list[Step]:
    """All recorded steps in the order of time."""
    steps = []
    for line in records.read_text().splitlines():
        at, job, fence, process, step = line.split()
        steps.append(Step(float(at), job, int(fence), int(process), int(step)))
    return sorted(steps, key=lambda step: step.at)


def find_leftovers(root: Path, home: Path, servers: Sequence[Path]) -> Leftovers:
    """Call this after all programs have been stopped. The servers, which work in the given folders, may still run."""
    server_processes = {pid for folder in servers for pid in processes_in(folder)}
    scratch = home / "scratch"
    files = [*scratch.rglob("*"), *(path for path in home.rglob(f"*{TEMPORARY}") if not path.is_relative_to(scratch))]
    return Leftovers(
        processes=[f"{pid}: {line}" for pid, line in processes_using(root).items() if pid not in server_processes],
        locks=[str(path) for path in home.rglob("*") if path.is_file() and is_locked(path)],
        files=[str(path.relative_to(home)) for path in files],
    )


def is_locked(path: Path) -> bool:
    """Return whether a process holds a lock of either kind (flock, POSIX) on the file."""
    with path.open("r+b") as file:
        for lock in (fcntl.flock, fcntl.lockf):
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False
