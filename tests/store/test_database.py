import asyncio
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from asyncpg.transaction import Transaction
from sqlalchemy import CheckConstraint, Connection, Engine, func, inspect, make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolExhausted

from base.errors import DatabaseUnavailable, StorageFull
from store import database as database_module
from store import jobs, keys, metrics, tables
from store.attempts import list_attempts
from store.database import Database, _exclusive_postgres, alembic_config, migrate, translated_errors
from store.errors import NotFound
from store.events import list_events
from store.tables import metadata
from tests.store.helpers import new_job, submitted
from tests.worker.processes import until

T = TypeVar("T")


def run_coroutine(url: str, function: Callable[[Database], Awaitable[T]]) -> T:
    """Run a coroutine function on an event loop and a Database of its own."""

    async def run() -> T:
        database = Database(url)
        try:
            return await function(database)
        finally:
            await database.close()

    return asyncio.run(run())


def test_write_then_read(database_url: str):
    async def run(database: Database) -> None:
        job, created = await database.write(jobs.submit, new_job())
        assert created
        assert await database.read(jobs.get, job.id, project="ours") == job

    run_coroutine(database_url, run)


def test_write_that_raises_is_rolled_back(database_url: str):
    def submit_and_raise(connection: Connection) -> None:
        jobs.submit(connection, new_job())
        raise NotFound("teacher", "x")

    async def run(database: Database) -> None:
        with pytest.raises(NotFound):
            await database.write(submit_and_raise)
        assert await database.read(jobs.count_by_status) == {}

    run_coroutine(database_url, run)


def test_write_concurrently_loses_nothing(database_url: str):
    async def run(database: Database) -> None:
        answers = await asyncio.gather(*(database.write(jobs.submit, new_job()) for _ in range(30)))
        assert len({job.id for job, _ in answers}) == 30
        assert await database.read(jobs.count_by_status) == {"queued": 30}

    run_coroutine(database_url, run)


def test_read_finds_the_rows_that_a_thread_wrote(database: Database, database_url: str):
    job = submitted(database)
    assert run_coroutine(database_url, lambda other: other.read(jobs.get, job.id)) == job


def test_connect_is_read_only_on_sqlite(sqlite_database_url: str):
    database = Database(sqlite_database_url)
    with pytest.raises((DBAPIError, DatabaseUnavailable), match="readonly"), database.connect() as connection:
        jobs.submit(connection, new_job())
    database.dispose()


def test_read_does_not_wait_for_a_writer_on_sqlite(sqlite_database_url: str):
    """The reads run inside the open transaction: a read that waited for its lock would wait for ever."""
    database = Database(sqlite_database_url)
    job = submitted(database)

    async def read(other: Database) -> None:
        assert (await other.read(jobs.get, job.id)).status == "queued"
        assert await other.read(jobs.count_by_status) == {"queued": 1}

    with database.begin() as connection:
        jobs.cancel(connection, job.id)
        run_coroutine(sqlite_database_url, read)
    database.dispose()


def test_write_uses_one_thread_on_sqlite(sqlite_database_url: str):
    def thread_name(connection: Connection) -> str:
        return threading.current_thread().name

    async def run(database: Database) -> None:
        assert len({*await asyncio.gather(*(database.write(thread_name) for _ in range(9)))}) == 1
        assert await database.read(thread_name) == threading.current_thread().name

    run_coroutine(sqlite_database_url, run)


def test_sqlite_engine_sets_pragmas_that_survive_a_power_cut(sqlite_database_url: str):
    """synchronous 2 is FULL; with NORMAL a power cut loses every commit since the last checkpoint of the log."""
    database = Database(sqlite_database_url)
    with database.begin() as connection:
        actual = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in PRAGMAS}
    database.dispose()
    assert actual == PRAGMAS


PRAGMAS = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}


def test_postgres_engines_limit_every_wait(postgres_database_url: str):
    limits = {
        "statement_timeout": "10s",
        "lock_timeout": "5s",
        "idle_in_transaction_session_timeout": "10s",
        "tcp_keepalives_idle": "10",
    }

    def shown(connection: Connection) -> dict[str, str]:
        return {name: connection.scalar(text(f"SHOW {name}")) for name in limits}

    assert run_coroutine(postgres_database_url, lambda database: database.read(shown)) == limits
    database = Database(postgres_database_url)
    with database.connect() as connection:
        assert shown(connection) == limits
    database.dispose()


def test_connect_replaces_a_connection_that_was_cut(postgres_database_url: str):
    """As after a restart of PostgreSQL."""
    victim = Database(postgres_database_url)
    with victim.connect() as connection:
        connection.execute(select(1))
    other = Database(postgres_database_url)
    with other.begin() as connection:
        terminate = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND usename = "
        )
        connection.execute(text(terminate + "current_user"))
    with victim.connect() as connection:
        assert connection.execute(select(1)).scalar_one() == 1
    victim.dispose()
    other.dispose()


@pytest.mark.parametrize("trusted_s", [0, 1000])
def test_read_replaces_a_connection_that_was_cut(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch, trusted_s: float
):
    """A trial finds it after a while without use, the event loop at once."""
    monkeypatch.setattr(database_module, "TRUSTED_S", trusted_s)

    async def run(database: Database) -> None:
        def session(connection: Connection) -> tuple[int, Any]:
            fairy = connection.connection
            return connection.execute(select(func.pg_backend_pid())).scalar_one(), fairy.driver_connection

        first, driver = await database.read(session)
        ended = asyncio.Event()
        driver.add_termination_listener(lambda _: ended.set())
        with psycopg.connect(postgres_database_url, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s)", (first,))
        if trusted_s:
            await ended.wait()
        second, _ = await database.read(session)
        assert second != first
        third, _ = await database.write(session)
        assert third == second

    run_coroutine(postgres_database_url, run)


def test_read_begins_no_transaction_on_postgres_and_stream_does(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
):
    begun = []
    start = Transaction.start

    async def counted(transaction: Transaction) -> None:
        begun.append(transaction)
        await start(transaction)

    monkeypatch.setattr(Transaction, "start", counted)

    async def run(database: Database) -> None:
        await database.write(lambda connection: jobs.submit(connection, new_job()))
        begun.clear()
        await database.read(jobs.count_by_status)
        await database.scan(jobs.list_jobs, "ours", jobs.JobQuery())
        assert not begun
        await database.stream(metrics.series, "job_none")
        assert len(begun) == 1

    run_coroutine(postgres_database_url, run)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_database_refuses_sqlite_in_memory(url: str):
    with pytest.raises(ValueError, match="SQLite in memory is not supported"):
        Database(url)


def test_dispose_is_idempotent_and_the_database_stays_usable(database: Database):
    submitted(database)
    database.dispose()
    database.dispose()
    assert submitted(database).status == "queued"


def test_dispose_finishes_the_queued_writes_first(sqlite_database_url: str):
    """One write runs, one is queued, then `dispose`: no connection is opened again after it."""
    database = Database(sqlite_database_url)
    begun, may_end = threading.Event(), threading.Event()

    def hold(connection: Connection) -> None:
        begun.set()
        may_end.wait()

    async def run() -> dict[str, int]:
        held = asyncio.ensure_future(database.write(hold))
        behind = asyncio.ensure_future(database.write(jobs.count_by_status))
        await asyncio.to_thread(begun.wait)
        closing = asyncio.ensure_future(asyncio.to_thread(database.dispose))
        await asyncio.to_thread(until, lambda: "_writer_thread" not in database.__dict__, "dispose to begin")
        may_end.set()
        await asyncio.gather(held, closing)
        return await behind

    assert asyncio.run(run()) == {}
    assert "_writers" not in database.__dict__


def test_write_behind_slow_ones_raises_database_unavailable_in_time(
    sqlite_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes at the same time; the first takes longer than the second may wait."""
    monkeypatch.setattr(database_module, "BUSY_S", 0.1)
    database = Database(sqlite_database_url)

    async def run() -> list[object]:
        slow = database.write(lambda connection: time.sleep(0.2))
        return await asyncio.gather(slow, database.write(jobs.count_by_status), return_exceptions=True)

    first, second = asyncio.run(run())
    assert first is None
    assert isinstance(second, DatabaseUnavailable) and "waited too long" in str(second)
    assert asyncio.run(database.write(jobs.count_by_status)) == {}
    database.dispose()


def test_read_and_write_wait_for_postgres_no_longer_than_answer_s(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(postgres_database_url)

    async def run() -> None:
        monkeypatch.setattr(database_module, "ANSWER_S", 0.3)
        for method in (database.read, database.write):
            with pytest.raises(DatabaseUnavailable, match="no answer in time"):
                await method(lambda connection: connection.execute(text("SELECT pg_sleep(30)")))
        monkeypatch.setattr(database_module, "ANSWER_S", 30)
        assert await database.read(jobs.count_by_status) == {}
        await database.close()

    asyncio.run(run())


@pytest.fixture
def unused_postgres_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"postgresql://distillery@127.0.0.1:{probe.getsockname()[1]}/postgres"


def test_translated_errors_without_a_server(unused_postgres_url: str):
    database = Database(unused_postgres_url)
    with pytest.raises(DatabaseUnavailable), database.begin():
        pass
    for method in (database.read, database.write):
        with pytest.raises(DatabaseUnavailable):
            asyncio.run(method(jobs.count_by_status))
    asyncio.run(database.close())


def test_translated_errors_of_a_file_that_cannot_be_opened(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'no folder' / 'distillery.db'}")
    with pytest.raises(DatabaseUnavailable, match="unable to open"), database.connect() as connection:
        jobs.count_by_status(connection)
    database.dispose()


def test_translated_errors_of_a_lock_that_is_held(database_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(database_module, "BUSY_S", 0.1)
    monkeypatch.setitem(database_module.POSTGRES_LIMITS, "lock_timeout", "100ms")
    holder, waiter = Database(database_url), Database(database_url)
    job = submitted(holder)

    def cancel(connection: Connection) -> None:
        jobs.cancel(connection, job.id)

    async def wait() -> None:
        try:
            with pytest.raises(DatabaseUnavailable, match="lock"):
                await waiter.write(cancel)
        finally:
            await waiter.close()

    with holder.begin() as connection:
        cancel(connection)
        with pytest.raises(DatabaseUnavailable, match="lock"), waiter.begin() as waiting:
            cancel(waiting)
        asyncio.run(wait())
    holder.dispose()


def test_translated_errors_of_a_statement_timeout(postgres_database_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(database_module.POSTGRES_LIMITS, "statement_timeout", "50ms")
    database = Database(postgres_database_url)
    with pytest.raises(DatabaseUnavailable, match="statement timeout"), database.connect() as connection:
        connection.execute(text("SELECT pg_sleep(5)"))
    database.dispose()


KEEPALIVES = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


def server_settings(connection: Connection) -> dict[str, str]:
    return {name: str(connection.scalar(text(f"SHOW {name}"))) for name in KEEPALIVES}


def test_postgres_engines_notice_that_the_other_end_vanished(postgres_database_url: str):
    """While sent data is unacknowledged, no keepalives are sent: then the user timeout ends the wait."""
    database = Database(postgres_database_url)
    with database.connect() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        with socket.fromfd(raw.fileno(), socket.AF_INET, socket.SOCK_STREAM) as ours:
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
        assert server_settings(connection) == KEEPALIVES
    database.dispose()
    assert run_coroutine(postgres_database_url, lambda other: other.read(server_settings)) == KEEPALIVES
    with _exclusive_postgres(make_url(postgres_database_url)) as connection:
        assert server_settings(connection) == KEEPALIVES
        assert connection.scalar(text("SHOW statement_timeout")) == "0", "a revision may take long"


def test_translated_errors_of_a_read_only_server(postgres_database_url: str):
    database = Database(postgres_database_url)
    with pytest.raises(DatabaseUnavailable, match="read-only"), database.begin() as connection:
        connection.execute(text("SET TRANSACTION READ ONLY"))
        connection.execute(text("DELETE FROM jobs"))
    database.dispose()


def postgres_error(state: str, message: str) -> OperationalError:
    error = psycopg.OperationalError(message)
    error.sqlstate = state
    return OperationalError("INSERT", {}, error)


def sqlite_error(code: int, message: str) -> OperationalError:
    error = sqlite3.OperationalError(message)
    error.sqlite_errorcode = code
    return OperationalError("INSERT", {}, error)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (sqlite_error(13, "database or disk is full"), StorageFull),
        (sqlite_error(5, "database is locked"), DatabaseUnavailable),
        (sqlite_error(8, "attempt to write a readonly database"), DatabaseUnavailable),
        (sqlite_error(0x10A, "disk I/O error"), DatabaseUnavailable),
        (sqlite_error(15, "locking protocol"), DatabaseUnavailable),
        (sqlite_error(1, "no such table: jobs"), OperationalError),
        (postgres_error("58030", "could not read block 3"), DatabaseUnavailable),
        (postgres_error("42P01", "relation jobs does not exist"), OperationalError),
        (PoolExhausted(), DatabaseUnavailable),
        (KeyError("ours"), KeyError),
        (FileNotFoundError("a file of the caller"), FileNotFoundError),
    ],
    ids=lambda value: str(value)[:40].split("\n")[0],
)
def test_translated_errors_by_code(error: Exception, expected: type[Exception]):
    with pytest.raises(expected), translated_errors():
        raise error


def test_translated_errors_leave_a_wrong_statement(database: Database):
    with pytest.raises((ProgrammingError, OperationalError)), database.connect() as connection:
        connection.execute(text("SELECT * FROM nothing"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_codec_stores_what_is_no_number_as_null(database: Database, number: float):
    job = submitted(database, resolved_spec={"alpha": number, "beta": 0.5, "teacher": None})
    assert job.resolved_spec == {"alpha": None, "beta": 0.5, "teacher": None}


def test_json_codec_keeps_order_and_characters(database: Database):
    spec = {"z": "ü", "a": "∑", "m": "😀"}
    assert list(submitted(database, spec=spec).spec.items()) == list(spec.items())


def test_migrate_makes_the_tables_of_the_metadata(database: Database):
    with database.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_migrate_makes_the_named_constraints(database: Database):
    """Alembic's comparison ignores checks, and what happens to a deleted job's rows."""
    with database.connect() as connection:
        schema = inspect(connection)
        for table in metadata.sorted_tables:
            names = {check["name"] for check in schema.get_check_constraints(table.name)}
            expected = {c.name for c in table.constraints if isinstance(c, CheckConstraint)}
            assert names == expected
            for key in schema.get_foreign_keys(table.name):
                assert key["options"] == {"ondelete": "CASCADE"}


def test_migrate_again_changes_nothing(database: Database, database_url: str):
    job = submitted(database)
    migrate(database_url)
    with database.connect() as connection:
        assert connection.exec_driver_sql("SELECT id FROM jobs").scalar_one() == job.id


def test_migrate_concurrently_on_sqlite(tmp_path: Path):
    path = tmp_path / "new folder" / "distillery.db"
    code = f"from store.database import migrate; migrate('sqlite:///{path}')"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == [""] * 2
    database = Database(f"sqlite:///{path}")
    assert submitted(database).status == "queued"
    database.dispose()


def test_migrate_concurrently_on_postgres(new_postgres_database: str):
    code = f"from store.database import migrate; migrate('{new_postgres_database}')"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == [""] * 2


def test_migrate_from_revision_2_keeps_the_rows_and_renames(database: Database, database_url: str):
    with database.begin() as connection:
        command.downgrade(alembic_config(connection), "0002")
    with database.begin() as connection:
        for statement in ROWS_OF_REVISION_2:
            connection.exec_driver_sql(statement)
    migrate(database_url)
    with database.connect() as connection:
        job = jobs.get(connection, "job_1")
        (attempt,) = list_attempts(connection, "job_1")
        events = {event.type: event.data for event in list_events(connection, "job_1", 0, 10)}
    assert (job.requested, job.attempts_without_progress, job.fence) == ("pause", 2, 3)
    assert (attempt.fence, attempt.attempts_without_progress) == (3, 2)
    assert events == {"queued": {}, "claimed": {"worker": "w", "device": "cpu", "attempt": 3, "takeover": True}}


ROWS_OF_REVISION_2 = (
    """INSERT INTO jobs (id, project, method, spec, resolved_spec, spec_sha256, status, wish, fence, owner, lease_until,
                         attempts, max_attempts, event_seq, created_at)
       VALUES ('job_1', 'ours', 'kd', '{}', '{}', 'x', 'running', 'pause', 3, 'w', 99, 2, 3, 2, 1)""",
    """INSERT INTO job_attempts (job_id, fence, attempt, owner, started_at) VALUES ('job_1', 3, 2, 'w', 2)""",
    """INSERT INTO job_events (job_id, seq, at, type, data) VALUES
       ('job_1', 1, 1, 'queued', '{}'),
       ('job_1', 2, 2, 'claimed', '{"worker": "w", "device": "cpu", "fence": 3, "rescued": true, "attempt": 2}')""",
)


def test_migrate_from_revision_5_gives_each_project_the_blobs_that_its_rows_name(database: Database, database_url: str):
    with database.begin() as connection:
        command.downgrade(alembic_config(connection), "0005")
    with database.begin() as connection:
        for statement in ROWS_OF_REVISION_5:
            connection.exec_driver_sql(re.sub(r"<(\d)>", lambda digit: 64 * digit[1], statement))
    migrate(database_url)
    with database.connect() as connection:
        named = sorted(connection.scalars(select(tables.projects.c.name)))
        rows = connection.execute(select(tables.project_blobs.c.project, tables.project_blobs.c.sha256)).all()
        job = jobs.get(connection, "job_1", "ours")
        assert keys.any_exists(connection) is False
    assert named == ["default", "ours", "theirs"]
    ours = {("ours", digit * 64) for digit in "12345"}
    assert {tuple(row) for row in rows} == ours | {("theirs", "5" * 64)}
    assert (job.created_by, job.created_by_name) == (None, None)


ROWS_OF_REVISION_5 = (
    """INSERT INTO jobs (id, project, method, spec, resolved_spec, spec_sha256, status, max_attempts, created_at)
       VALUES ('job_1', 'ours', 'kd', '{}', '{"dataset": {"source": "blob:sha256:<1>"}}', 'x', 'succeeded', 3, 1)""",
    """INSERT INTO artifacts (job_id, name, sha256, bytes, media_type)
       VALUES ('job_1', 'report.json', '<2>', 1, 'x')""",
    """INSERT INTO uploads (id, project, sha256, status, created_at) VALUES
       ('up_1', 'ours', '<3>', 'complete', 1), ('up_2', 'ours', '<9>', 'open', 1)""",
    """INSERT INTO datasets (id, project, name, sha256, thumbnails, created_at)
       VALUES ('ds_1', 'ours', 'd', '<4>', '{"sha256": "<5>"}', 1)""",
    "INSERT INTO models (id, project, name, sha256, created_at) VALUES ('mdl_1', 'theirs', 'm', '<5>', 1)",
)
"""`<1>` stands for a digest of ones."""


def test_downgrade_leaves_nothing(sqlite_database_url: str):
    database = Database(sqlite_database_url)
    with database.begin() as connection:
        command.downgrade(alembic_config(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
    database.dispose()


@pytest.fixture
def new_postgres_database(migrated_postgres: Engine) -> Iterator[str]:
    with migrated_postgres.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE unmigrated")
    yield migrated_postgres.url.set(drivername="postgresql", database="unmigrated").render_as_string()
    with migrated_postgres.connect() as connection:
        connection.exec_driver_sql("DROP DATABASE unmigrated")
