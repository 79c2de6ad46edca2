"""Real databases and brokers for every room: each test gets a migrated and empty database for itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from base import clock as base_clock
from local import servers
from store.database import Database, migrate
from store.tables import metadata
from tests.clock import SettableClock

HANG_UP_ON_ALL_OTHERS = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server for this test process, started when first asked for."""
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    """A Valkey server for this test process, started when first asked for."""
    with servers.valkey() as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "distillery.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[Engine]:
    """One database for all tests of this process: emptying it takes a millisecond, copying it hundreds."""
    ours = make_url(postgres_url).set(drivername="postgresql+psycopg")
    engine = create_engine(ours, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    migrate(postgres_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sqlite_database_url(sqlite_template: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'distillery.db')}"


@pytest.fixture
def postgres_database_url(migrated_postgres: Engine) -> Iterator[str]:
    yield migrated_postgres.url.set(drivername="postgresql").render_as_string()
    with migrated_postgres.connect() as connection:
        connection.execute(text(HANG_UP_ON_ALL_OTHERS))
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SettableClock:
    """The time of this process, in Python and in SQL: `clock.advance(31)` instead of waiting."""
    monkeypatch.setattr(base_clock, "offset_s", 0.0)
    return SettableClock()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The test runs on both databases."""
    url: str = request.getfixturevalue(f"{request.param}_database_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """For threads; a test with coroutines makes its own and closes it on its own event loop."""
    database = Database(database_url)
    yield database
    database.dispose()
