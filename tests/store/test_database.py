import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection, select, text
from sqlalchemy.exc import DBAPIError

from base.errors import DatabaseUnavailable
from store import database as databases
from store import jobs
from store.database import Database
from store.errors import NotFound
from tests.store.scene import SHA256, submitted
from tests.worker.processes import until

T = TypeVar("T")

NEW: dict[str, Any] = {
    "project": "ours",
    "spec": {},
    "resolved": {},
    "name": None,
    "method": "kd",
    "spec_sha256": SHA256,
    "max_attempts": 3,
}


def with_database(url: str, story: Callable[[Database], Awaitable[T]]) -> T:
    """Coroutines with a database of their own, closed on their own event loop."""

    async def told() -> T:
        database = Database(url)
        try:
            return await story(database)
        finally:
            await database.close()

    return asyncio.run(told())


def test_coroutines_write_and_read(database_url: str):
    async def story(database: Database) -> None:
        job, created = await database.write(jobs.submit, **NEW)
        assert created
        assert await database.read(jobs.get, job.id, project="ours") == job

    with_database(database_url, story)


def test_what_raises_writes_nothing(database_url: str):
    def submit_and_stumble(connection: Connection) -> None:
        jobs.submit(connection, **NEW)
        raise NotFound("teacher", "x")

    async def story(database: Database) -> None:
        with pytest.raises(NotFound):
            await database.write(submit_and_stumble)
        assert await database.read(jobs.by_status) == {}

    with_database(database_url, story)


def test_many_coroutines_at_once_lose_nothing(database_url: str):
    async def story(database: Database) -> None:
        answers = await asyncio.gather(*(database.write(jobs.submit, **NEW) for _ in range(30)))
        assert len({job.id for job, _ in answers}) == 30
        assert await database.read(jobs.by_status) == {"queued": 30}

    with_database(database_url, story)


def test_threads_and_coroutines_see_the_same_rows(database: Database, database_url: str):
    job = submitted(database)
    assert with_database(database_url, lambda other: other.read(jobs.get, job.id)) == job


def test_looking_cannot_write_on_sqlite(sqlite_database_url: str):
    database = Database(sqlite_database_url)
    with pytest.raises((DBAPIError, DatabaseUnavailable), match="readonly"), database.connect() as connection:
        jobs.submit(connection, **NEW)
    database.dispose()


def test_reads_go_on_while_a_writer_holds_the_lock_on_sqlite(sqlite_database_url: str):
    """The reads run inside the held transaction: if one of them waited for the lock, this would never end."""
    database = Database(sqlite_database_url)
    job = submitted(database)

    async def look(other: Database) -> None:
        assert (await other.read(jobs.get, job.id)).status == "queued"
        assert await other.read(jobs.by_status) == {"queued": 1}

    with database.begin() as connection:
        jobs.cancel(connection, job.id)
        with_database(sqlite_database_url, look)
    database.dispose()


def test_sqlite_writes_of_a_loop_come_from_one_thread(sqlite_database_url: str):
    def who(connection: Connection) -> str:
        return threading.current_thread().name

    async def story(database: Database) -> None:
        assert len({*await asyncio.gather(*(database.write(who) for _ in range(9)))}) == 1
        assert await database.read(who) == threading.current_thread().name

    with_database(sqlite_database_url, story)


def test_sqlite_keeps_what_it_acknowledged(sqlite_database_url: str):
    """synchronous 2 is FULL; with NORMAL a power cut takes every commit since the last checkpoint of the log."""
    database = Database(sqlite_database_url)
    with database.begin() as connection:
        said = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in PRAGMAS}
    database.dispose()
    assert said == PRAGMAS


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}


def test_postgres_lets_nobody_wait_for_ever(postgres_database_url: str):
    limits = {
        "statement_timeout": "10s",
        "lock_timeout": "5s",
        "idle_in_transaction_session_timeout": "10s",
        "tcp_keepalives_idle": "10",
    }

    def shown(connection: Connection) -> dict[str, str]:
        return {name: connection.scalar(text(f"SHOW {name}")) for name in limits}

    assert with_database(postgres_database_url, lambda database: database.read(shown)) == limits
    database = Database(postgres_database_url)
    with database.connect() as connection:
        assert shown(connection) == limits
    database.dispose()


def test_a_connection_that_was_cut_is_replaced(postgres_database_url: str):
    """What a restart of PostgreSQL looks like to a pool."""
    victim = Database(postgres_database_url)
    with victim.connect() as connection:
        connection.execute(select(1))
    other = Database(postgres_database_url)
    with other.begin() as connection:
        hang_up = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = "
        connection.execute(text(hang_up + "current_user"))
    with victim.connect() as connection:
        assert connection.execute(select(1)).scalar_one() == 1
    victim.dispose()
    other.dispose()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_memory_outlives_no_process(url: str):
    with pytest.raises(ValueError, match="SQLite in memory is not supported"):
        Database(url)


def test_disposing_twice_is_disposing_once(database: Database):
    submitted(database)
    database.dispose()
    database.dispose()
    assert partial(submitted, database)().status == "queued"


def test_what_still_waits_to_be_written_is_written_before_the_connections_go(sqlite_database_url: str):
    """A write that holds the writer, one behind it, and then the end: nothing is opened again behind its back."""
    database = Database(sqlite_database_url)
    begun, go_on = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        begun.set()
        go_on.wait()

    async def story() -> dict[str, int]:
        held = asyncio.ensure_future(database.write(hold))
        behind = asyncio.ensure_future(database.write(jobs.by_status))
        await asyncio.to_thread(begun.wait)
        closing = asyncio.ensure_future(asyncio.to_thread(database.dispose))
        await asyncio.to_thread(until, lambda: "_writer_thread" not in database.__dict__, "the end to begin")
        go_on.set()
        await asyncio.gather(held, closing)
        return await behind

    assert asyncio.run(story()) == {}
    assert "_writers" not in database.__dict__


def test_a_write_behind_others_that_wait_is_told_so_in_time(
    sqlite_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes at once, the first of which takes longer than one may wait for a turn."""
    monkeypatch.setattr(databases, "BUSY_S", 0.1)
    database = Database(sqlite_database_url)

    async def ask() -> list[object]:
        slow = database.write(lambda connection: time.sleep(0.2))
        return await asyncio.gather(slow, database.write(jobs.by_status), return_exceptions=True)

    first, second = asyncio.run(ask())
    assert first is None
    assert isinstance(second, DatabaseUnavailable) and "behind them" in str(second)
    assert asyncio.run(database.write(jobs.by_status)) == {}
    database.dispose()


def test_a_coroutine_waits_for_postgres_no_longer_than_agreed(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(postgres_database_url)

    async def ask() -> None:
        monkeypatch.setattr(databases, "ANSWER_S", 0.3)
        for way in (database.read, database.write):
            with pytest.raises(DatabaseUnavailable, match="no answer in time"):
                await way(lambda connection: connection.execute(text("SELECT pg_sleep(30)")))
        monkeypatch.setattr(databases, "ANSWER_S", 30)
        assert await database.read(jobs.by_status) == {}
        await database.close()

    asyncio.run(ask())
