"""Writes under a fence: in order, in batches, insisted on, and given up for good reasons only."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from store import lifecycle
from store.errors import DatabaseUnavailable, LeaseLost
from tests.worker.processes import until
from tests.worker.table import Table
from worker import ledger as ledgers
from worker.ledger import GivenUp, Ledger


class Away:
    """A table that is out of reach the first few times."""

    def __init__(self, times: float) -> None:
        self.times = times

    @contextmanager
    def begin(self) -> Iterator[None]:
        self.times -= 1
        if self.times >= 0:
            raise DatabaseUnavailable("away")
        yield


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(ledgers, "LONGEST_WAIT_S", 0.001)


def ledger(table: Any, lost: threading.Event, drain_over: bool = False) -> Ledger:
    claim = SimpleNamespace(job=SimpleNamespace(id="job_1"), fence=1)
    desk = SimpleNamespace(database=table, drain=SimpleNamespace(over=drain_over))
    return Ledger(claim, desk, lost)


def test_it_insists_until_the_table_is_back():
    assert ledger(Away(times=5), threading.Event()).insist(lambda _: "written") == "written"


def test_a_lost_lease_ends_the_insistence():
    lost = threading.Event()
    lost.set()
    with pytest.raises(LeaseLost):
        ledger(Away(times=float("inf")), lost).insist(lambda _: None)


def test_so_does_the_end_of_the_grace():
    with pytest.raises(GivenUp):
        ledger(Away(times=float("inf")), threading.Event(), drain_over=True).insist(lambda _: None)


def test_all_is_written_in_order_before_it_closes():
    written: list[int] = []
    with ledger(Away(times=3), threading.Event()) as book:
        for number in range(100):
            book.write(lambda _, number=number: written.append(number) or [])
    assert written == list(range(100))


def test_files_go_after_the_commit_and_not_before(tmp_path: Path):
    old = tmp_path / "old.pt"
    old.touch()

    def write(_: Any) -> list[Path]:
        assert old.exists()
        return [old]

    with ledger(Away(times=0), threading.Event()) as book:
        book.write(write)
    assert not old.exists()


def test_what_cannot_be_written_is_told():
    with ledger(Away(times=0), threading.Event()) as book:
        book.write(lambda _: 1 / 0)
        until(lambda: book.error, "the error")
    assert isinstance(book.error, ZeroDivisionError)


def test_a_stale_fence_is_turned_away(table: Table):
    """Real rows: another attempt has claimed the job meanwhile."""
    table.submit()
    with table.database.begin() as connection:
        first = lifecycle.claim(connection, "first", lease_s=-1, rescue=False)
        second = lifecycle.claim(connection, "second", lease_s=60, rescue=True)
    assert first is not None and second is not None
    lost = threading.Event()
    desk = SimpleNamespace(database=table.database, drain=SimpleNamespace(over=False))
    with Ledger(first, desk, lost) as book:
        book.progress({"percent": 50})
        assert lost.wait(30)
    assert table.job(first.job.id).progress is None
