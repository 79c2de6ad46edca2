"""What each driver needs to be told, and what it says when there is no database."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json, to_json
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolExhausted
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from base.errors import DatabaseUnavailable, StorageFull

BUSY_S = 10
"""So long a SQLite writer waits for its turn."""
CONNECT_S = 5
ANSWER_S = 12
"""So long a coroutine waits for Postgres in all, whatever it waits for: longer than a statement may take there."""
# A vanished client must not keep a row lock that SKIP LOCKED then skips for ever, nor a vanished server its client.
SERVER_KEEPALIVES = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    # Milliseconds. None of the above is sent while what was said before is not acknowledged.
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

SQLITE_FULL, POSTGRES_FULL = 13, "53100"
SQLITE_AWAY = {5, 6, 8, 10, 14, 15}
"""Busy, locked, read-only, input/output error, cannot open, lost a race for the locks of the log."""
POSTGRES_AWAY = ("08", "25006", "40", "53", "55", "57", "58")
"""Classes: connection, serialization and deadlock, resources, not in the needed state (lock timeout), intervention,
input/output error; and of one class a single state: the server takes no writes, as one that stands by."""


def _as_json(value: Any) -> str:
    return to_json(value, inf_nan_mode="null").decode()


JSON_CODEC: dict[str, Any] = {"json_serializer": _as_json, "json_deserializer": from_json}


def sqlite_engine(url: URL, begin: str, *pragmas: str) -> Engine:
    """An engine whose transactions all begin in one way: SQLite refuses at once a reader that turns writer."""
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_S, "check_same_thread": False},
        pool_size=20,
        pool_timeout=BUSY_S,
        **JSON_CODEC,
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, record: Any) -> None:
        # The driver's own BEGIN is deferred and late; ours is below.
        connection.isolation_level = None
        for pragma in ("PRAGMA foreign_keys = ON", "PRAGMA synchronous = FULL", *pragmas):
            connection.execute(pragma)

    @event.listens_for(engine, "begin")
    def begin_our_way(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def postgres_engine(url: URL) -> Engine:
    """For threads."""
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args=psycopg_arguments(POSTGRES_LIMITS),
        pool_size=10,
        pool_timeout=CONNECT_S,
        pool_pre_ping=True,
        **JSON_CODEC,
    )


def psycopg_arguments(settings: dict[str, str]) -> dict[str, Any]:
    """For a connection that both ends give up when the other vanishes; `settings` are the server's."""
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return {"connect_timeout": CONNECT_S, "options": options, **CLIENT_KEEPALIVES}


def postgres_async_engine(url: URL) -> AsyncEngine:
    """For coroutines of one event loop."""
    return create_async_engine(
        url.set(drivername="postgresql+asyncpg"),
        connect_args={"timeout": CONNECT_S, "command_timeout": 15, "server_settings": POSTGRES_LIMITS},
        pool_size=10,
        pool_timeout=CONNECT_S,
        pool_pre_ping=True,
        **JSON_CODEC,
    )


@contextmanager
def told_plainly(*unwrapped: type[Exception]) -> Iterator[None]:
    """What each driver says in its own words when there is no database, or no room, in ours.

    `unwrapped`: what a driver lets through as it is (asyncpg: OSError, where nobody listens or answers).
    """
    try:
        yield
    except DBAPIError as error:
        code = _code(error)
        if code in (SQLITE_FULL, POSTGRES_FULL):
            raise StorageFull("the database has no room to write", "free some space, then try again") from error
        if error.connection_invalidated or _away(error, code):
            raise DatabaseUnavailable(str(error.orig)) from error
        raise
    except PoolExhausted as error:
        raise DatabaseUnavailable("every connection to the database is in use") from error
    except unwrapped as error:
        raise DatabaseUnavailable(f"the database cannot be reached: {str(error) or 'no answer in time'}") from error


def _code(error: DBAPIError) -> int | str | None:
    """SQLite's primary result code, or Postgres's SQLSTATE; None where the driver never got as far as that."""
    if (code := getattr(error.orig, "sqlite_errorcode", None)) is not None:
        return int(code) & 0xFF
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


def _away(error: DBAPIError, code: int | str | None) -> bool:
    if code is None:
        return isinstance(error, OperationalError | InterfaceError)
    return code in SQLITE_AWAY if isinstance(code, int) else code.startswith(POSTGRES_AWAY)
