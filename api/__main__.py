"""`python -m api`: the REST server and the web page, set up by DISTILLERY_… variables.

It does not migrate: `python -m store migrate` does, once, before any number of servers and workers start.
"""

import logging
import sys
import time

import uvicorn
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from api.bell import Bell
from api.main import create_app
from base.errors import DatabaseUnavailable
from store.database import MIGRATIONS, Database
from store.settings import settings_or_exit

STREAMS_END_S = 3
"""Event streams stay open for as long as a job: at shutdown they are cut, and browsers come back by themselves."""
WAIT_S = 1.0
"""Between looks whether the database is there."""

log = logging.getLogger("distillery.api")


def main() -> None:
    (settings,) = settings_or_exit("api")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    _refuse_an_old_schema(settings.database_url)
    # A bell in memory is heard in this process only, where no worker is: workers find jobs by looking.
    bell = None if settings.broker_url.startswith("memory:") else Bell(settings.broker_url)
    app = create_app(settings, ring=bell.ring if bell else _silence)
    try:
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=STREAMS_END_S,
        )
    finally:
        if bell:
            bell.close()


def _refuse_an_old_schema(url: str) -> None:
    newest = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    database = Database(url)
    try:
        found = _revision(database)
    except DatabaseUnavailable as error:
        sys.exit(f"the database cannot be opened: {error}; `python -m store migrate` makes one")
    finally:
        database.dispose()
    if found != newest:
        sys.exit(f"the database is at revision {found}, not {newest}: run `python -m store migrate` first")


def _revision(database: Database) -> str | None:
    """A server that is away is waited for, as by the workers; a file that is not there will not come by itself."""
    told = False
    while True:
        try:
            with database.connect() as connection:
                return MigrationContext.configure(connection).get_current_revision()
        except DatabaseUnavailable as error:
            if database.is_sqlite:
                raise
            if not told:
                log.warning("waiting for the database: %s", error)
            told = True
            time.sleep(WAIT_S)


def _silence() -> None:
    return


if __name__ == "__main__":
    main()
