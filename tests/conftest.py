"""Real databases and brokers for every room: each test gets a migrated database of its own, copied from a template."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from local import servers
from store.database import Database, migrate


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
def postgres_template(postgres_url: str) -> URL:
    """A migrated database to copy: a copy takes a twentieth of a migration's time."""
    _on_server(postgres_url, "CREATE DATABASE template_distillery")
    template = make_url(postgres_url).set(database="template_distillery")
    migrate(template.render_as_string())
    return template


@pytest.fixture
def sqlite_database_url(sqlite_template: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'distillery.db')}"


@pytest.fixture
def postgres_database_url(postgres_template: URL) -> Iterator[str]:
    mine = postgres_template.set(database=f"test_{uuid4().hex}")
    server = postgres_template.set(database="postgres").render_as_string()
    _on_server(server, f"CREATE DATABASE {mine.database} TEMPLATE {postgres_template.database}")
    yield mine.render_as_string()
    _on_server(server, f"DROP DATABASE {mine.database} WITH (FORCE)")


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


def _on_server(url: str, statement: str) -> None:
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool, isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.execute(text(statement))
