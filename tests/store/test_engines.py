import asyncio
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Connection, make_url, text
from sqlalchemy.exc import OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolExhausted

from base.errors import DatabaseUnavailable, StorageFull
from store import engines, jobs
from store.database import Database
from store.engines import told_plainly
from store.migrate import _alone_on_postgres
from tests.store.scene import submitted


@pytest.fixture
def nobody_listens() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"postgresql://distillery@127.0.0.1:{probe.getsockname()[1]}/postgres"


def test_a_database_that_is_away_is_told_as_such(nobody_listens: str):
    database = Database(nobody_listens)
    with pytest.raises(DatabaseUnavailable), database.begin():
        pass
    for ask in (database.read, database.write):
        with pytest.raises(DatabaseUnavailable):
            asyncio.run(ask(jobs.by_status))
    asyncio.run(database.close())


def test_a_file_that_cannot_be_opened_is_a_database_that_is_away(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'no folder' / 'distillery.db'}")
    with pytest.raises(DatabaseUnavailable, match="unable to open"), database.connect() as connection:
        jobs.by_status(connection)
    database.dispose()


def test_a_held_lock_is_a_database_that_is_away_for_now(database_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "BUSY_S", 0.1)
    monkeypatch.setitem(engines.POSTGRES_LIMITS, "lock_timeout", "100ms")
    holder, waiter = Database(database_url), Database(database_url)
    job = submitted(holder)

    def cancel(connection: Connection) -> None:
        jobs.cancel(connection, job.id)

    async def ask() -> None:
        try:
            with pytest.raises(DatabaseUnavailable, match="lock"):
                await waiter.write(cancel)
        finally:
            await waiter.close()

    with holder.begin() as connection:
        cancel(connection)
        with pytest.raises(DatabaseUnavailable, match="lock"), waiter.begin() as waiting:
            cancel(waiting)
        asyncio.run(ask())
    holder.dispose()


def test_a_statement_that_takes_too_long_is_ended(postgres_database_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engines.POSTGRES_LIMITS, "statement_timeout", "50ms")
    database = Database(postgres_database_url)
    with pytest.raises(DatabaseUnavailable, match="statement timeout"), database.connect() as connection:
        connection.execute(text("SELECT pg_sleep(5)"))
    database.dispose()


KEPT_ALIVE = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


def served(connection: Connection) -> dict[str, str]:
    """What the server keeps to on its side of this connection."""
    return {name: str(connection.scalar(text(f"SHOW {name}"))) for name in KEPT_ALIVE}


async def last_read(database: Database, look: Callable[[Connection], dict[str, str]]) -> dict[str, str]:
    try:
        return await database.read(look)
    finally:
        await database.close()


def test_both_ends_give_up_when_the_other_vanishes(postgres_database_url: str):
    """Keepalives are not sent while data is unacknowledged: then it is the user timeout that ends the wait."""
    database = Database(postgres_database_url)
    with database.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        with socket.fromfd(raw.fileno(), socket.AF_INET, socket.SOCK_STREAM) as ours:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        assert served(connection) == KEPT_ALIVE
    assert asyncio.run(last_read(database, served)) == KEPT_ALIVE
    with _alone_on_postgres(make_url(postgres_database_url)) as connection:
        assert served(connection) == KEPT_ALIVE
        assert connection.scalar(text("SHOW statement_timeout")) == "0", "a revision takes as long as it takes"


def test_a_server_that_only_reads_is_a_database_that_is_away(postgres_database_url: str):
    database = Database(postgres_database_url)
    with pytest.raises(DatabaseUnavailable, match="read-only"), database.begin() as connection:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        connection.execute(text("DELETE FROM jobs"))
    database.dispose()


def postgres_says(state: str, message: str) -> OperationalError:
    error = psycopg.OperationalError(message)
    error.sqlstate = state
    return OperationalError("INSERT", {}, error)


def sqlite_says(code: int, message: str) -> OperationalError:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorcode = code
    return OperationalError("INSERT", {}, error)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (sqlite_says(13, "database or disk is full"), StorageFull),
        (sqlite_says(5, "database is locked"), DatabaseUnavailable),
        (sqlite_says(8, "attempt to write a readonly database"), DatabaseUnavailable),
        (sqlite_says(0x10A, "disk I/O error"), DatabaseUnavailable),
        (sqlite_says(15, "locking protocol"), DatabaseUnavailable),
        (sqlite_says(1, "no such table: jobs"), OperationalError),
        (postgres_says("58030", "could not read block 3"), DatabaseUnavailable),
        (postgres_says("42P01", "relation jobs does not exist"), OperationalError),
        (PoolExhausted(), DatabaseUnavailable),
        (KeyError("ours"), KeyError),
        (FileNotFoundError("a file of the caller"), FileNotFoundError),
    ],
    ids=lambda value: str(value)[:40].split("\n")[0],
)
def test_what_is_wrong_with_the_database_is_told_from_what_is_wrong_with_us(error: Exception, told: type[Exception]):
    with pytest.raises(told), told_plainly():
        raise error


def test_a_wrong_statement_stays_our_fault(database: Database):
    with pytest.raises((ProgrammingError, OperationalError)), database.connect() as connection:
        connection.execute(text("SELECT * FROM nothing"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_has_no_word_for_what_is_no_number(database: Database, number: float):
    job = submitted(database, resolved={"alpha": number, "beta": 0.5, "teacher": None})
    assert job.resolved_spec == {"alpha": None, "beta": 0.5, "teacher": None}


def test_documents_keep_their_order_and_their_letters(database: Database):
    told: Callable[[], list[str]] = lambda: list(submitted(database, spec={"z": "ü", "a": "∑", "m": "😀"}).spec.items())  # noqa: E731
    assert told() == [("z", "ü"), ("a", "∑"), ("m", "😀")]
