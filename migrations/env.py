"""Runs migrations on the connection of `store.database.migrate`, or on that of the Settings if called by hand."""

from alembic import context
from sqlalchemy import Connection

from store.database import Database
from store.settings import Settings
from store.tables import metadata


def run(connection: Connection) -> None:
    # SQLite cannot change most of a table: Alembic makes a new one and copies the rows.
    batch = connection.dialect.name == "sqlite"
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=batch, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


callers_connection = context.config.attributes.get("connection")
if callers_connection is not None:
    run(callers_connection)
else:
    database = Database(Settings().database_url)
    with database.begin() as connection:
        run(connection)
    database.dispose()
