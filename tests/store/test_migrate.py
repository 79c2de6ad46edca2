import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import CheckConstraint, Engine, inspect

from store.database import Database, migrate
from store.migrate import scripts
from store.tables import metadata
from tests.store.scene import submitted


def test_the_revisions_make_what_the_tables_say(database: Database):
    with database.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []


def test_constraints_are_made_as_named(database: Database):
    """What a comparison does not look at: checks, and what happens to a deleted job's rows."""
    with database.connect() as connection:
        seen = inspect(connection)
        for table in metadata.sorted_tables:
            made = {check["name"] for check in seen.get_check_constraints(table.name)}
            meant = {c.name for c in table.constraints if isinstance(c, CheckConstraint)}
            assert made == meant
            for key in seen.get_foreign_keys(table.name):
                assert key["options"] == {"ondelete": "CASCADE"}


def test_migrating_again_changes_nothing(database: Database, database_url: str):
    job = submitted(database)
    migrate(database_url)
    with database.connect() as connection:
        assert connection.exec_driver_sql("SELECT id FROM jobs").scalar_one() == job.id


def test_processes_that_start_at_once_make_one_database(tmp_path: Path):
    path = tmp_path / "new folder" / "distillery.db"
    code = f"from store.database import migrate; migrate('sqlite:///{path}')"
    racing = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in racing] == [""] * 2
    database = Database(f"sqlite:///{path}")
    assert submitted(database).status == "queued"
    database.dispose()


def test_processes_that_start_at_once_make_one_database_on_postgres(new_postgres_database: str):
    code = f"from store.database import migrate; migrate('{new_postgres_database}')"
    racing = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in racing] == [""] * 2


def test_the_way_back_leaves_nothing(sqlite_database_url: str):
    database = Database(sqlite_database_url)
    with database.begin() as connection:
        command.downgrade(scripts(connection), "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
    database.dispose()


@pytest.fixture
def new_postgres_database(migrated_postgres: Engine) -> Iterator[str]:
    with migrated_postgres.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE unmigrated")
    yield migrated_postgres.url.set(drivername="postgresql", database="unmigrated").render_as_string()
    with migrated_postgres.connect() as connection:
        connection.exec_driver_sql("DROP DATABASE unmigrated")
