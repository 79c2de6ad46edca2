"""Writes of an attempt: in order, in batches, and tried again until they are committed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from base.errors import DatabaseUnavailable
from store import lifecycle, tables
from store.errors import LeaseLost
from tests.worker.job_database import JobDatabase
from tests.worker.processes import until
from worker import writer as writer_module
from worker.writer import AttemptWriter, DrainOver


class AwayDatabase:
    """A table that is out of reach the first few times."""

    def __init__(self, db: JobDatabase, times: float) -> None:
        self.db, self.times = db, times

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        self.times -= 1
        if self.times >= 0:
            raise DatabaseUnavailable("away")
        with self.db.database.begin() as connection:
            yield connection


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(writer_module, "LONGEST_WAIT_S", 0.001)


def writer_of_a_claim(db: JobDatabase, away: float = 0, lost: bool = False, drain_over: bool = False) -> AttemptWriter:
    """The writer of a job that has just been claimed. `away`: how often the database cannot be reached."""
    db.submit()
    with db.database.begin() as connection:
        claim = lifecycle.claim(connection, "owner", lease_s=60, takeover=False)
    assert claim is not None
    context = SimpleNamespace(database=AwayDatabase(db, away), drain=SimpleNamespace(is_over=drain_over))
    was_lost = threading.Event()
    if lost:
        was_lost.set()
    return AttemptWriter(claim, context, was_lost)


def test_commit_tries_until_the_database_is_back(db: JobDatabase):
    assert writer_of_a_claim(db, away=5).commit(lambda _: "written") == "written"


def test_commit_writes_once_if_the_answer_to_a_commit_is_lost(db: JobDatabase, arm: Callable[[str], None]):
    written: list[int] = []
    writer = writer_of_a_claim(db)
    for number in range(2):
        arm("lines.committed=away")
        assert writer.commit(lambda _, number=number: written.append(number) or number) == number
    assert written == [0, 1]


def test_commit_writes_again_what_was_not_committed(db: JobDatabase):
    tries: list[int] = []

    def write(_: Any) -> str:
        tries.append(len(tries))
        if len(tries) == 1:
            raise DatabaseUnavailable("cut before COMMIT")
        return "written"

    assert writer_of_a_claim(db).commit(write) == "written"
    assert tries == [0, 1]


def test_commit_raises_lease_lost(db: JobDatabase):
    with pytest.raises(LeaseLost):
        writer_of_a_claim(db, away=float("inf"), lost=True).commit(lambda _: None)


def test_commit_raises_drain_over_after_the_time_to_leave(db: JobDatabase):
    with pytest.raises(DrainOver):
        writer_of_a_claim(db, away=float("inf"), drain_over=True).commit(lambda _: None)


def test_attempt_writer_writes_everything_in_order_before_it_closes(db: JobDatabase):
    written: list[int] = []
    with writer_of_a_claim(db, away=3) as writer:
        for number in range(100):
            writer.write(lambda _, number=number: written.append(number) or [])
    assert written == list(range(100))


def test_attempt_writer_deletes_files_after_the_commit(db: JobDatabase, tmp_path: Path):
    old = tmp_path / "old.pt"
    old.touch()

    def write(_: Any) -> list[Path]:
        assert old.exists()
        return [old]

    with writer_of_a_claim(db) as writer:
        writer.write(write)
    assert not old.exists()


def test_attempt_writer_logs_a_file_that_cannot_be_deleted(
    db: JobDatabase, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """The path is a folder, which cannot be unlinked."""
    with writer_of_a_claim(db) as writer:
        writer.write(lambda _: [tmp_path])
    assert writer.error is None
    assert f"{tmp_path}" in caplog.text


def test_attempt_writer_keeps_an_error_of_a_write(db: JobDatabase):
    with writer_of_a_claim(db) as writer:
        writer.write(lambda _: 1 / 0)
        until(lambda: writer.error, "the error")
    assert isinstance(writer.error, ZeroDivisionError)


def test_attempt_writer_writes_nothing_under_a_stale_fence(db: JobDatabase):
    """Another attempt has claimed the job meanwhile."""
    db.submit()
    with db.database.begin() as connection:
        first = lifecycle.claim(connection, "first", lease_s=-1, takeover=False)
        second = lifecycle.claim(connection, "second", lease_s=60, takeover=True)
    assert first is not None and second is not None
    lost = threading.Event()
    context = SimpleNamespace(database=db.database, drain=SimpleNamespace(is_over=False))
    with AttemptWriter(first, context, lost) as writer:
        writer.write_progress({"percent": 50})
        assert lost.wait(30)
    assert db.job(first.job.id).progress is None


@pytest.mark.parametrize(
    ("lines", "grows"),
    [
        ([{"percent": 1, "step": 1}], True),
        ([{"percent": 0, "step": 0}], False),
        ([{"percent": None}], False),
        ([{"percent": 0.5, "step": 1}, {"percent": 0.5, "step": 1}], False),
        ([{"percent": 0.5, "step": 1}, {"percent": 0.6, "step": 1}], True),
        ([{"percent": 5, "step": 9}, {"percent": 1, "step": 1}], False),
        ([None], True),
    ],
    ids=str,
)
def test_attempt_writer_tells_progress_that_grows_from_one_that_repeats(
    db: JobDatabase, lines: list[dict[str, Any] | None], grows: bool
):
    writer = writer_of_a_claim(db)
    for number, line in enumerate(lines):
        if number == len(lines) - 1:
            writer._write_batch()
            with db.database.begin() as connection:
                connection.execute(update(tables.jobs).values(progressed_at=5.0))
        if line is None:
            writer.note_work()
        else:
            writer.write_progress(line)
    writer._write_batch()
    with db.database.connect() as connection:
        progressed_at = connection.scalar(select(tables.jobs.c.progressed_at))
    assert (progressed_at > 5.0) is grows
