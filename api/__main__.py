"""`python -m api`: the REST server and the web page, configured by DISTILLERY_… variables.

It does not migrate the database: run `python -m store migrate` once, before servers and workers start. With
DISTILLERY_API_PROCESSES it is several processes behind one address.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `after_imports`

import atexit
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import uvicorn
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from fastapi import FastAPI

from api.app import SERVER_OPTIONS, create_app
from api.wakeup_sender import WakeUpSender
from base.errors import DatabaseUnavailable
from base.logs import log_to_stderr
from base.processes import after_imports, end_with_parent, raise_descriptor_limit
from base.wakeup import MEMORY
from store.database import MIGRATIONS, Database
from store.keys import KeyNeeded, require_if_reachable
from store.settings import Settings, keep_private, settings_or_exit

SILENT_S = 60
"""The time without a sign of life after which one of several processes is killed. Its imports count, too."""
RETRY_S = 1.0
"""The time between two attempts to reach the database at start."""

log = logging.getLogger("distillery.api")


def main() -> None:
    after_imports()
    (settings,) = settings_or_exit("api")
    # Our own line for each request has the latency and the key, too.
    log_to_stderr("uvicorn.access", form=settings.log_format)
    raise_descriptor_limit()
    keep_private(settings)
    _refuse_an_old_schema(settings.database_url)
    _refuse_without_key(settings)
    where: dict[str, Any] = {"host": settings.host, "port": settings.port}
    if settings.api_processes > 1:
        # uvicorn binds the socket once, and starts the processes; one that dies, or is silent, is started again.
        several = {"factory": True, "workers": settings.api_processes, "timeout_worker_healthcheck": SILENT_S}
        uvicorn.run("api.__main__:application", **several, **where, **SERVER_OPTIONS)
        return
    with _made(settings) as app:
        uvicorn.run(app, **where, **SERVER_OPTIONS)


def application() -> FastAPI:
    """Return the application of one of several processes, which share nothing but database and files."""
    after_imports()
    end_with_parent(os.getppid())
    (settings,) = settings_or_exit("api")
    log_to_stderr()
    until_exit = ExitStack()
    atexit.register(until_exit.close)
    return until_exit.enter_context(_made(settings))


@contextmanager
def _made(settings: Settings) -> Iterator[FastAPI]:
    """Make the application, with its sender of wake-up messages."""
    # A broker in memory cannot reach other processes; then workers poll for jobs.
    sender = None if settings.broker_url.startswith(MEMORY) else WakeUpSender(settings.broker_url)
    try:
        yield create_app(settings, wake_workers=sender.wake_workers if sender else lambda: None)
    finally:
        if sender:
            sender.close()


def _refuse_an_old_schema(url: str) -> None:
    newest = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    database = Database(url)
    try:
        revision = _revision(database)
    except DatabaseUnavailable as error:
        sys.exit(f"the database cannot be opened: {error}; `python -m store migrate` makes one")
    finally:
        database.dispose()
    if revision != newest:
        sys.exit(f"the database is at revision {revision}, not {newest}: run `python -m store migrate` first")


def _refuse_without_key(settings: Settings) -> None:
    try:
        require_if_reachable(settings.database_url, settings.host, settings.admin_key_hash)
    except (KeyNeeded, DatabaseUnavailable) as error:
        sys.exit(f"api: {error}")


def _revision(database: Database) -> str | None:
    """Return the tables' revision. Waits for a database server that cannot be reached, but not for a missing file."""
    logged = False
    while True:
        try:
            with database.connect() as connection:
                return MigrationContext.configure(connection).get_current_revision()
        except DatabaseUnavailable as error:
            if database.is_sqlite:
                raise
            if not logged:
                log.warning("waiting for the database: %s", error)
            logged = True
            time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
