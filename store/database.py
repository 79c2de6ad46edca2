"""How a connection is had. Store functions take one, and neither open nor commit: whoever calls decides how.

                 SQLite                                         Postgres
    read         at once, on the caller's event loop            asyncpg, through run_sync
    write        one writer thread, BEGIN IMMEDIATE             asyncpg, through run_sync
    connect      a read-only connection                         psycopg
    begin        BEGIN IMMEDIATE                                psycopg

On SQLite a reader of the write-ahead log never waits, so reading on the loop is safe as long as the connection cannot
write; and one writer thread answers sooner than many that contend for one lock.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from base.errors import DatabaseUnavailable
from store.engines import ANSWER_S, BUSY_S, postgres_async_engine, postgres_engine, sqlite_engine, told_plainly
from store.migrate import migrate

__all__ = ["Database", "migrate"]

P = ParamSpec("P")
T = TypeVar("T")


class Database:
    """One database, for coroutines (`read`, `write`) and for threads (`connect`, `begin`). Or DatabaseUnavailable."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite and self.url.database in (None, "", ":memory:"):
            raise ValueError("SQLite in memory is not supported: jobs must outlive the process")

    async def read(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store function that only looks."""
        if self.is_sqlite:
            with self.connect() as connection:
                return function(connection, *args, **kwargs)
        with told_plainly(OSError):
            async with asyncio.timeout(ANSWER_S), self._asynchronous.connect() as connection:
                return await connection.run_sync(function, *args, **kwargs)

    async def write(self, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a store function in a transaction of its own; it is committed when this returns."""
        if self.is_sqlite:
            here = asyncio.get_running_loop()
            write = partial(self._write, time.monotonic(), function, *args, **kwargs)
            return await here.run_in_executor(self._writer_thread, write)
        with told_plainly(OSError):
            async with asyncio.timeout(ANSWER_S), self._asynchronous.begin() as connection:
                return await connection.run_sync(function, *args, **kwargs)

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """A connection to look with, for threads."""
        with told_plainly(), self._readers.connect() as connection:
            yield connection

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A write transaction, for threads: committed at the end, rolled back on an exception."""
        with told_plainly(), self._writers.begin() as connection:
            yield connection

    def dispose(self) -> None:
        """Close what threads used. After `read` or `write` on Postgres, `await close()` instead."""
        # First: the writes that it has yet to do would open again what is closed here.
        if "_writer_thread" in self.__dict__:
            self.__dict__.pop("_writer_thread").shutdown()
        for name in ("_readers", "_writers"):
            if name in self.__dict__:
                self.__dict__.pop(name).dispose()

    async def close(self) -> None:
        if "_asynchronous" in self.__dict__:
            await self.__dict__.pop("_asynchronous").dispose()
        self.dispose()

    def _write(
        self, asked_at: float, function: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        # Each before it may have waited for the lock as long as one may: the last of many would never be answered.
        if time.monotonic() - asked_at > BUSY_S:
            raise DatabaseUnavailable("other writes waited for the database, and this one behind them")
        with self.begin() as connection:
            return function(connection, *args, **kwargs)

    @cached_property
    def _writer_thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="database-writer")

    @cached_property
    def _writers(self) -> Engine:
        return sqlite_engine(self.url, "BEGIN IMMEDIATE") if self.is_sqlite else postgres_engine(self.url)

    @cached_property
    def _readers(self) -> Engine:
        return sqlite_engine(self.url, "BEGIN", "PRAGMA query_only = ON") if self.is_sqlite else self._writers

    @cached_property
    def _asynchronous(self) -> AsyncEngine:
        return postgres_async_engine(self.url)
