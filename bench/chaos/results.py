"""What a storm left, read from outside: the rows by SQL of our own, the files by hashing them, the steps as recorded.

Nothing here uses the code under test. It is plain data, so that a check of it can be checked.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from bench.chaos.clients import Answer
from bench.chaos.injector import Strike
from bench.chaos.plan import Errand
from bench.processes import Exit, at_home_in, mentioning

TEMPORARY = ".tmp"
PREFIX = "sqlite:///"

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    at: float
    """Seconds of `boottime()`."""
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
    """The same job run by hand, once and undisturbed: its files' digests, its points, its report."""

    files: dict[str, str]
    points: dict[tuple[str, str, int], float | None]
    report: Row


@dataclass(frozen=True)
class Leftovers:
    """What lies about after everybody has gone."""

    processes: list[str]
    locks: list[str]
    files: list[str]


@dataclass(frozen=True)
class Evidence:
    errands: Sequence[Errand]
    answers: Sequence[Answer]
    rows: Rows
    files: dict[str, File]
    steps: list[Step]
    references: dict[str, Reference]
    """By recipe."""
    strikes: Sequence[Strike]
    exits: Sequence[Exit]
    leftovers: Leftovers
    unheard: int = 0
    """Strikes at the broker that met none."""


def rows(url: str) -> Rows:
    with _cursor(url) as ask:
        return Rows(
            jobs=ask("SELECT * FROM jobs ORDER BY id"),
            events=ask("SELECT * FROM job_events ORDER BY job_id, seq"),
            attempts=ask("SELECT * FROM job_attempts ORDER BY job_id, fence"),
            checkpoints=ask("SELECT * FROM checkpoints ORDER BY job_id, fence, step"),
            artifacts=ask("SELECT * FROM artifacts ORDER BY job_id, name"),
            metrics=ask("SELECT * FROM metrics ORDER BY job_id, trial, key, step"),
        )


@contextlib.contextmanager
def _cursor(url: str) -> Iterator[Any]:
    """A function that answers SQL with rows; documents are decoded."""
    if url.startswith(PREFIX):
        with contextlib.closing(sqlite3.connect(url.removeprefix(PREFIX))) as connection:
            connection.row_factory = sqlite3.Row
            yield lambda sql: [_decoded(dict(row)) for row in connection.execute(sql)]
    else:
        with psycopg.connect(url, row_factory=dict_row) as connection:
            yield lambda sql: connection.execute(sql).fetchall()


def _decoded(row: Row) -> Row:
    documents = {"spec", "resolved_spec", "progress", "result", "error", "data"}
    return {name: json.loads(value) if name in documents and value else value for name, value in row.items()}


def files(store: Path) -> dict[str, File]:
    """Every file below a folder, hashed; by its path."""
    found = {}
    for path in sorted(store.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            name = path.relative_to(store).as_posix()
            found[name] = File(name, len(content), hashlib.sha256(content).hexdigest())
    return found


def steps(records: Path) -> list[Step]:
    """In the order of time."""
    read = []
    for line in records.read_text().splitlines():
        at, job, fence, process, step = line.split()
        read.append(Step(float(at), job, int(fence), int(process), int(step)))
    return sorted(read, key=lambda step: step.at)


def leftovers(root: Path, home: Path, servers: Sequence[Path]) -> Leftovers:
    """To be asked when all programs have been stopped; servers that work in these folders may run on."""
    theirs = {pid for folder in servers for pid in at_home_in(folder)}
    inodes = {path.stat().st_ino: str(path) for path in home.rglob("*") if path.is_file()}
    scratch = home / "scratch"
    lying = [str(path.relative_to(home)) for path in scratch.rglob("*")] if scratch.exists() else []
    lying += [str(path.relative_to(home)) for path in home.rglob(f"*{TEMPORARY}") if not path.is_relative_to(scratch)]
    return Leftovers(
        processes=[f"{pid}: {words}" for pid, words in mentioning(root).items() if pid not in theirs],
        locks=[inodes[inode] for inode in _locked() if inode in inodes],
        files=lying,
    )


def _locked() -> list[int]:
    """Inodes that somebody on this machine holds a lock of; devices are not told apart."""
    lines = Path("/proc/locks").read_text().splitlines()
    return [int(word.split(":")[2]) for line in lines for word in line.split() if word.count(":") == 2]
