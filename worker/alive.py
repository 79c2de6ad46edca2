"""`python -m worker.alive`: exit status 0 if a worker of this host proves that it consumes; for health checks.

The table is asked, not the process: a worker that hangs, or has lost the database, is there and does not work.
"""

import socket
import sys

from sqlalchemy import Connection

from base.errors import DatabaseUnavailable
from store import workers
from store.database import Database
from store.settings import Settings


def alive(connection: Connection, host: str, within_s: float) -> bool:
    return any(worker.host == host for worker in workers.list_consuming(connection, within_s))


def main() -> int:
    settings = Settings()
    database = Database(settings.database_url)
    try:
        with database.connect() as connection:
            seen = alive(connection, socket.gethostname(), settings.lease_s)
    except DatabaseUnavailable as error:
        sys.stderr.write(f"the database cannot be asked: {error}\n")
        return 1
    finally:
        database.dispose()
    if not seen:
        sys.stderr.write(f"no worker of this host has proved for {settings.lease_s:g} s that it consumes\n")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
