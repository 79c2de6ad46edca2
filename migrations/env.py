"""How a migration runs: on the connection that `store.migrate` holds; on Settings where Alembic is called by hand."""

from alembic import context
from sqlalchemy import Connection

from store.database import Database
from store.settings import Settings
from store.tables import metadata


def run(connection: Connection) -> None:
    # SQLite cannot alter most of a table; Alembic then makes a new one and copies.
    batch = connection.dialect.name == "sqlite"
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=batch, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    database = Database(Settings().database_url)
    with database.begin() as connection:
        run(connection)
    database.dispose()
