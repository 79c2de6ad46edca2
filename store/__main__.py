"""`python -m store migrate`: bring the database of the settings to the newest revision.

`python -m store collect`: remove what nobody needs any more, now; with `--dry-run` only say what that is.
"""

import argparse
import sys
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from base.errors import DatabaseUnavailable, StorageFull
from store import cache
from store.blobs import BlobStore
from store.collector import Collector, Retention, collect
from store.database import Database, migrate
from store.settings import Settings, settings_or_exit


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser("migrate", help="make or upgrade the tables")
    collecting = commands.add_parser("collect", help="remove what nobody needs any more")
    collecting.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    asked = parser.parse_args()
    (settings,) = settings_or_exit("store")
    if asked.command == "migrate":
        _migrate(settings.database_url)
    else:
        _collect(settings, asked.dry_run)


def _migrate(url: str) -> None:
    migrate(url)
    print(f"{make_url(url).render_as_string(hide_password=True)} is up to date")


def _collect(settings: Settings, dry_run: bool) -> None:
    def tell(kind: str, path: Path, bytes: int) -> None:
        print(f"{kind}\t{bytes}\t{path}")

    database = Database(settings.database_url)
    collector = Collector(database, BlobStore(settings.files), Retention.of(settings), dry_run, tell=tell)
    try:
        if dry_run:
            collector.run()
        else:
            collect(collector, every_s=0)
    except (DatabaseUnavailable, StorageFull) as error:
        sys.exit(f"store: {error}")
    except DBAPIError as error:
        sys.exit(f"store: the database is not as it should be, `python -m store migrate` makes it so: {error.orig}")
    finally:
        database.dispose()
    for entry in cache.trim(settings.home / "cache", settings.cache_max_bytes, dry_run):
        tell("cache", entry.folder, entry.size.bytes)
    if collector.faults:
        sys.exit("\n".join(f"store: {fault}" for fault in collector.faults))


if __name__ == "__main__":
    main()
