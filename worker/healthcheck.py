"""`python -m worker.healthcheck`: exit status 0 if a worker of this host consumes jobs, as its row proves.

It queries the database, not the process: the process of a worker that hangs, or has lost the database, still runs.
"""

import socket
import sys

from base.errors import DatabaseUnavailable
from store import workers
from store.database import Database
from store.settings import Settings


def main() -> int:
    settings, host = Settings(), socket.gethostname()
    database = Database(settings.database_url)
    try:
        with database.connect() as connection:
            healthy = any(worker.host == host for worker in workers.list_consuming(connection, settings.lease_s))
    except DatabaseUnavailable as error:
        sys.stderr.write(f"the database cannot be queried: {error}\n")
        return 1
    finally:
        database.dispose()
    if not healthy:
        sys.stderr.write(f"no worker of this host has proved for {settings.lease_s:g} s that it consumes jobs\n")
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
