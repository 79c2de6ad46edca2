"""Bring a database to the newest revision. Several processes may start at once: one migrates, the others wait."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from base.files import make_folder
from store.engines import SERVER_KEEPALIVES, psycopg_arguments, sqlite_engine, told_plainly

SCRIPTS = Path(__file__).parents[1] / "migrations"
ADVISORY_LOCK = 7_310_577
"""Any number, as long as nobody else uses it in this database."""


def migrate(url: str) -> None:
    """Make the database what store/tables.py says, from whatever it is; nothing happens where it is so already."""
    parsed = make_url(url)
    alone = _alone_on_sqlite if parsed.get_backend_name() == "sqlite" else _alone_on_postgres
    with told_plainly(), alone(parsed) as connection:
        command.upgrade(scripts(connection), "head")


def scripts(connection: Connection) -> Config:
    """What Alembic's commands need to work on a connection that somebody else opened and commits."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _alone_on_sqlite(url: URL) -> Iterator[Connection]:
    """A lock file, since SQLite changes to the write-ahead log only where nobody else looks on."""
    path = Path(url.database or "").absolute()
    make_folder(path.parent)
    with path.with_suffix(".migrating").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        engine = sqlite_engine(url, "BEGIN IMMEDIATE", "PRAGMA journal_mode = WAL")
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()


@contextmanager
def _alone_on_postgres(url: URL) -> Iterator[Connection]:
    driver = url.set(drivername="postgresql+psycopg")
    # No limit of time: a revision takes as long as it takes, and who waits for its turn waits for that.
    engine = create_engine(driver, poolclass=NullPool, connect_args=psycopg_arguments(SERVER_KEEPALIVES))
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        yield connection
