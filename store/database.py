"""Database connections. A store function gets one from its caller, who opens and commits it in one of these ways:

                 SQLite                                         PostgreSQL
    read         at once, on the caller's event loop            asyncpg, through run_sync, each statement by itself
    scan         in a thread                                    as read
    stream       as scan                                        as read, in one transaction
    write        one writer thread, BEGIN IMMEDIATE             asyncpg, through run_sync
    connect      a read-only connection                         psycopg
    begin        BEGIN IMMEDIATE                                psycopg

A reader of SQLite's write-ahead log never waits, so reading a few rows by their keys on the event loop is safe as long
as the connection cannot write. What takes longer, such as a list, is a `scan`. One writer thread answers sooner than
many that contend for one lock.

On PostgreSQL a read waits for each message to the server and back: beside other programs each may take a turn of the
scheduler. So reads send no BEGIN and no ROLLBACK, and a connection is tried only after a while without use.
"""

import asyncio
import fcntl
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from pydantic_core import from_json, to_json
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from base.errors import DatabaseUnavailable, StorageFull
from base.files import make_folder

if TYPE_CHECKING:
    from alembic.config import Config

P = ParamSpec("P")
T = TypeVar("T")

BUSY_S = 10
"""The longest time that a SQLite writer waits for its turn."""
SCANS = 4
"""The scans of SQLite that run at the same time."""
CONNECT_S = 5
TRUSTED_S = 1
"""A connection that was in use so recently is used again without a trial."""
ANSWER_S = 12
"""The longest total time that a coroutine waits for PostgreSQL; longer than the statement timeout."""


class Database:
    """One database, for coroutines (`read`, `scan`, `stream`, `write`) and for threads (`connect`, `begin`).

    All six raise DatabaseUnavailable if it cannot be reached, and StorageFull if its disk is full.
    """

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite and self.url.database in (None, "", ":memory:"):
            raise ValueError("SQLite in memory is not supported: jobs must outlive the process")

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store function that only reads."""
        if self.is_sqlite:
            with self.connect() as connection:
                return function(connection, *args, **kwargs)
        with translated_errors(OSError):
            async with asyncio.timeout(ANSWER_S), self._each_statement.connect() as connection:
                return await connection.run_sync(function, *args, **kwargs)

    async def fetch(self, statement: str, value: str) -> Sequence[Any] | None:
        """Return the row of a SELECT by its key, which stands for `{}` in the statement; None if there is none.

        It goes to the driver itself: SQLAlchemy takes several times as long as so short a read. None also if the
        database cannot answer: the caller then reads in another way, which says why.
        """
        if self.is_sqlite:
            try:
                row: Sequence[Any] | None = self._fetcher.execute(statement.format("?"), (value,)).fetchone()
            except sqlite3.Error:
                return None
            return row
        import asyncpg  # workers need none

        try:
            async with asyncio.timeout(CONNECT_S), self._fetchers.acquire() as connection:
                found: Sequence[Any] | None = await connection.fetchrow(statement.format("$1"), value)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return None
        return found

    async def scan(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store function that reads many rows, or large ones."""
        if not self.is_sqlite:
            return await self.read(function, *args, **kwargs)

        def read() -> T:
            with self.connect() as connection:
                return function(connection, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._scanner_threads, read)

    async def stream(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a scan that takes its rows a few at a time (`yield_per`): PostgreSQL needs a transaction for it."""
        if self.is_sqlite:
            return await self.scan(function, *args, **kwargs)
        with translated_errors(OSError):
            async with asyncio.timeout(ANSWER_S), self._asynchronous.connect() as connection:
                return await connection.run_sync(function, *args, **kwargs)

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store function in a transaction of its own, which is committed when this returns."""
        if self.is_sqlite:
            loop = asyncio.get_running_loop()
            write = partial(self._write, time.monotonic(), function, *args, **kwargs)
            return await loop.run_in_executor(self._writer_thread, write)
        with translated_errors(OSError):
            async with asyncio.timeout(ANSWER_S), self._asynchronous.begin() as connection:
                return await connection.run_sync(function, *args, **kwargs)

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Open a connection for reading."""
        with translated_errors(), self._readers.connect() as connection:
            yield connection

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """Open a write transaction: committed at the end, rolled back on an exception."""
        with translated_errors(), self._writers.begin() as connection:
            yield connection

    def dispose(self) -> None:
        """Close the connections of threads. After `read` or `write` on PostgreSQL, `await close()` instead."""
        # End the thread first: its remaining writes would open a connection again.
        if "_writer_thread" in self.__dict__:
            self.__dict__.pop("_writer_thread").shutdown()
        if "_fetcher" in self.__dict__:
            self.__dict__.pop("_fetcher").close()
        if "_scanner_threads" in self.__dict__:
            self.__dict__.pop("_scanner_threads").shutdown()
        for name in ("_readers", "_writers"):
            if name in self.__dict__:
                self.__dict__.pop(name).dispose()

    async def close(self) -> None:
        if "_fetchers" in self.__dict__:
            self.__dict__.pop("_fetchers").terminate()
        self.__dict__.pop("_each_statement", None)
        if "_asynchronous" in self.__dict__:
            await self.__dict__.pop("_asynchronous").dispose()
        self.dispose()

    def _write(
        self, requested_at: float, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        # Each write before this one may have waited BUSY_S for the lock: the last of many would wait without end.
        if time.monotonic() - requested_at > BUSY_S:
            raise DatabaseUnavailable("the writes before this one waited too long for the database")
        with self.begin() as connection:
            return function(connection, *args, **kwargs)

    @cached_property
    def _writer_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="database-writer")

    @cached_property
    def _scanner_threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=SCANS, thread_name_prefix="database-scanner")

    @cached_property
    def _fetcher(self) -> sqlite3.Connection:
        # It makes no file where there is none.
        path = f"file:{quote(str(self.url.database))}?mode=rw"
        connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, uri=True)
        connection.execute("PRAGMA query_only = ON")
        return connection

    @cached_property
    def _fetchers(self) -> "_LazyPool":
        return _LazyPool(self.url)

    @cached_property
    def _writers(self) -> Engine:
        return _sqlite_engine(self.url, "BEGIN IMMEDIATE") if self.is_sqlite else _postgres_engine(self.url)

    @cached_property
    def _readers(self) -> Engine:
        return _sqlite_engine(self.url, "BEGIN", "PRAGMA query_only = ON") if self.is_sqlite else self._writers

    @cached_property
    def _asynchronous(self) -> AsyncEngine:
        return _postgres_async_engine(self.url)

    @cached_property
    def _each_statement(self) -> AsyncEngine:
        """The same connections, for statements that are no transaction."""
        return self._asynchronous.execution_options(isolation_level="AUTOCOMMIT")


# ── errors ──

SQLITE_FULL, POSTGRES_FULL = 13, "53100"
SQLITE_UNAVAILABLE = {5, 6, 8, 10, 14, 15}
"""Busy, locked, read-only, input/output error, cannot open, lost a race for the locks of the log."""
POSTGRES_UNAVAILABLE = ("08", "25006", "40", "53", "55", "57", "58")
"""Classes: connection, serialization and deadlock, resources, wrong state (lock timeout), operator intervention,
input/output error; and one single state: the server is read-only, such as a standby."""


@contextmanager
def translated_errors(*unwrapped: type[Exception]) -> Iterator[None]:
    """Raise DatabaseUnavailable or StorageFull in place of the driver's own errors.

    `unwrapped` are errors that a driver does not wrap (asyncpg: OSError if the server cannot be reached).
    """
    try:
        yield
    except DBAPIError as error:
        code = _code(error)
        if code in (SQLITE_FULL, POSTGRES_FULL):
            hint = "free some disk space, then try again"
            raise StorageFull("the database has no disk space to write", hint) from error
        if error.connection_invalidated or _is_unavailable(error, code):
            raise DatabaseUnavailable(str(error.orig)) from error
        raise
    except PoolExhausted as error:
        raise DatabaseUnavailable("every connection to the database is in use") from error
    except unwrapped as error:
        raise DatabaseUnavailable(f"the database cannot be reached: {str(error) or 'no answer in time'}") from error


def _code(error: DBAPIError) -> int | str | None:
    """Return SQLite's primary result code, or PostgreSQL's SQLSTATE; None if there was no answer."""
    if (code := getattr(error.orig, "sqlite_errorcode", None)) is not None:
        return int(code) & 0xFF
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


def _is_unavailable(error: DBAPIError, code: int | str | None) -> bool:
    if code is None:
        return isinstance(error, OperationalError | InterfaceError)
    return code in SQLITE_UNAVAILABLE if isinstance(code, int) else code.startswith(POSTGRES_UNAVAILABLE)


# ── drivers ──

# A vanished client must not hold a row lock, which SKIP LOCKED would skip for ever; a vanished server must not block
# its clients.
SERVER_KEEPALIVES = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    # In ms. While sent data is not acknowledged, no keepalives are sent.
    "tcp_user_timeout": "10000",
}
CLIENT_KEEPALIVES = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
POSTGRES_LIMITS = {
    "statement_timeout": "10s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "10s",
    **SERVER_KEEPALIVES,
}


def _to_json(value: Any) -> str:
    return to_json(value, inf_nan_mode="null").decode()


JSON_CODEC: dict[str, Any] = {"json_serializer": _to_json, "json_deserializer": from_json}


def _sqlite_engine(url: URL, begin: str, *pragmas: str) -> Engine:
    """Make an engine whose transactions all begin with `begin`: SQLite refuses a reader that starts to write."""
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_S, "check_same_thread": False},
        pool_size=20,
        pool_timeout=BUSY_S,
        **JSON_CODEC,
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, record: Any) -> None:
        # Turns off the driver's own BEGIN, which is deferred.
        connection.isolation_level = None
        for pragma in ("PRAGMA foreign_keys = ON", "PRAGMA synchronous = FULL", *pragmas):
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _postgres_engine(url: URL) -> Engine:
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args=_psycopg_arguments(POSTGRES_LIMITS),
        pool_size=10,
        pool_timeout=CONNECT_S,
        pool_pre_ping=True,
        **JSON_CODEC,
    )


def _psycopg_arguments(server_settings: dict[str, str]) -> dict[str, Any]:
    options = " ".join(f"-c {name}={value}" for name, value in server_settings.items())
    return {"connect_timeout": CONNECT_S, "options": options, **CLIENT_KEEPALIVES}


def _postgres_async_engine(url: URL) -> AsyncEngine:
    """Make an engine for the coroutines of one event loop."""
    engine = create_async_engine(
        url.set(drivername="postgresql+asyncpg"),
        connect_args={"timeout": CONNECT_S, "command_timeout": 15, "server_settings": POSTGRES_LIMITS},
        pool_size=10,
        pool_timeout=CONNECT_S,
        **JSON_CODEC,
    )
    dialect = engine.dialect

    # SQLAlchemy's `pool_pre_ping` sends three messages before every use. The event loop knows of a connection that the
    # server has closed; only one that was silently cut has to be tried.
    @event.listens_for(engine.sync_engine, "checkout")
    def check(connection: Any, record: Any, proxy: Any) -> None:
        if connection.driver_connection.is_closed():
            raise InvalidatePoolError
        if time.monotonic() - record.info.get("used_at", -math.inf) < TRUSTED_S:
            return
        try:
            dialect.do_ping(connection)
        except dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error

    @event.listens_for(engine.sync_engine, "checkin")
    def note(connection: Any, record: Any) -> None:
        record.info["used_at"] = time.monotonic()

    return engine


class _LazyPool:
    """asyncpg's own pool of one event loop, made with the first connection."""

    def __init__(self, url: URL) -> None:
        self._url = url.set(drivername="postgresql")
        self._pool: Any = None

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        if self._pool is None:
            import asyncpg

            self._pool = asyncpg.create_pool(
                self._url.render_as_string(hide_password=False),
                min_size=0,
                max_size=10,
                timeout=CONNECT_S,
                command_timeout=CONNECT_S,
                server_settings=POSTGRES_LIMITS,
                reset=_keep_session,
            )
        async with (await self._pool).acquire() as connection:
            yield connection

    def terminate(self) -> None:
        if self._pool is not None:
            self._pool.terminate()


async def _keep_session(connection: Any) -> None:
    """Leave a connection as it is: a single SELECT changes nothing that would have to be reset."""


# ── migration ──

MIGRATIONS = Path(__file__).parents[1] / "migrations"
ADVISORY_LOCK = 7_310_577
"""The key of the migration's advisory lock; no other lock of this database uses it."""


def migrate(url: str, revision: str = "head") -> None:
    """Bring a database to the newest revision, or to an earlier one. If several processes start at once, one migrates
    and the others wait."""
    from alembic import command  # takes a sixth of a worker's start, and most processes migrate nothing

    parsed = make_url(url)
    exclusive = _exclusive_sqlite if parsed.get_backend_name() == "sqlite" else _exclusive_postgres
    with translated_errors(), exclusive(parsed) as connection:
        command.upgrade(alembic_config(connection), revision)


def alembic_config(connection: Connection) -> "Config":
    """Return the configuration for Alembic's commands on a connection that the caller opens and commits."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _exclusive_sqlite(url: URL) -> Iterator[Connection]:
    """Open a connection while a lock file is held: SQLite enters WAL mode only if no other connection is open."""
    path = Path(url.database or "").absolute()
    make_folder(path.parent)
    with path.with_suffix(".migrating").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        engine = _sqlite_engine(url, "BEGIN IMMEDIATE", "PRAGMA journal_mode = WAL")
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()


@contextmanager
def _exclusive_postgres(url: URL) -> Iterator[Connection]:
    driver = url.set(drivername="postgresql+psycopg")
    # Without a statement timeout: a revision may take long, and so may the wait for another process.
    engine = create_engine(driver, poolclass=NullPool, connect_args=_psycopg_arguments(SERVER_KEEPALIVES))
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        yield connection
