"""Writes under a fence: in order, in batches, insisted on, and given up for good reasons only."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Connection

from base.errors import DatabaseUnavailable
from store import lifecycle
from store.errors import LeaseLost
from tests.worker.processes import until
from tests.worker.table import Table
from worker import ledger as ledgers
from worker.ledger import GivenUp, Ledger


class Away:
    """A table that is out of reach the first few times."""

    def __init__(self, table: Table, times: float) -> None:
        self.table, self.times = table, times

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        self.times -= 1
        if self.times >= 0:
            raise DatabaseUnavailable("away")
        with self.table.database.begin() as connection:
            yield connection


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(ledgers, "LONGEST_WAIT_S", 0.001)


def ledger(table: Table, away: float = 0, lost: bool = False, drain_over: bool = False) -> Ledger:
    """Of a job that has just been claimed."""
    table.submit()
    with table.database.begin() as connection:
        claim = lifecycle.claim(connection, "owner", lease_s=60, takeover=False)
    assert claim is not None
    desk = SimpleNamespace(database=Away(table, away), drain=SimpleNamespace(over=drain_over))
    was_lost = threading.Event()
    if lost:
        was_lost.set()
    return Ledger(claim, desk, was_lost)


def test_it_insists_until_the_table_is_back(table: Table):
    assert ledger(table, away=5).insist(lambda _: "written") == "written"


def test_what_is_in_is_not_written_again_where_the_answer_was_lost(table: Table, arm: Callable[[str], None]):
    written: list[int] = []
    book = ledger(table)
    for number in range(2):
        arm("lines.committed=away")
        assert book.insist(lambda _, number=number: written.append(number) or number) == number
    assert written == [0, 1]


def test_what_was_not_committed_is_written_again(table: Table):
    tries: list[int] = []

    def write(_: Any) -> str:
        tries.append(len(tries))
        if len(tries) == 1:
            raise DatabaseUnavailable("cut before COMMIT")
        return "written"

    assert ledger(table).insist(write) == "written"
    assert tries == [0, 1]


def test_a_lost_lease_ends_the_insistence(table: Table):
    with pytest.raises(LeaseLost):
        ledger(table, away=float("inf"), lost=True).insist(lambda _: None)


def test_so_does_the_end_of_the_grace(table: Table):
    with pytest.raises(GivenUp):
        ledger(table, away=float("inf"), drain_over=True).insist(lambda _: None)


def test_all_is_written_in_order_before_it_closes(table: Table):
    written: list[int] = []
    with ledger(table, away=3) as book:
        for number in range(100):
            book.write(lambda _, number=number: written.append(number) or [])
    assert written == list(range(100))


def test_files_go_after_the_commit_and_not_before(table: Table, tmp_path: Path):
    old = tmp_path / "old.pt"
    old.touch()

    def write(_: Any) -> list[Path]:
        assert old.exists()
        return [old]

    with ledger(table) as book:
        book.write(write)
    assert not old.exists()


def test_a_file_that_does_not_go_stops_nothing(table: Table, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A folder stands for it, which cannot be unlinked: the collector comes by later."""
    with ledger(table) as book:
        book.write(lambda _: [tmp_path])
    assert book.error is None
    assert f"{tmp_path}" in caplog.text


def test_what_cannot_be_written_is_told(table: Table):
    with ledger(table) as book:
        book.write(lambda _: 1 / 0)
        until(lambda: book.error, "the error")
    assert isinstance(book.error, ZeroDivisionError)


def test_a_stale_fence_is_turned_away(table: Table):
    """Real rows: another attempt has claimed the job meanwhile."""
    table.submit()
    with table.database.begin() as connection:
        first = lifecycle.claim(connection, "first", lease_s=-1, takeover=False)
        second = lifecycle.claim(connection, "second", lease_s=60, takeover=True)
    assert first is not None and second is not None
    lost = threading.Event()
    desk = SimpleNamespace(database=table.database, drain=SimpleNamespace(over=False))
    with Ledger(first, desk, lost) as book:
        book.progress({"percent": 50})
        assert lost.wait(30)
    assert table.job(first.job.id).progress is None
