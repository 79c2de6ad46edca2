"""`python -m api`: the REST server and the web page, set up by DISTILLERY_… variables.

It does not migrate: `python -m store migrate` does, once, before any number of servers and workers start.
"""

import logging
import sys

import uvicorn
from store.database import behind_head
from store.settings import Settings

from api.bell import Bell
from api.main import create_app

STREAMS_END_S = 3
"""Event streams stay open for as long as a job: at shutdown they are cut, and browsers come back by themselves."""


def main() -> None:
    settings = Settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    schema = behind_head(settings.database_url)
    if schema is not None:
        sys.exit(f"the database's schema is {schema}: run `python -m store migrate` first")
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


def _silence() -> None:
    return


if __name__ == "__main__":
    main()
