"""Commands for operators.

python -m store migrate              bring the database to the newest revision
python -m store collect [--dry-run]  delete the files that are not needed any more, or only list them
"""

import argparse
import sys
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from base.errors import DatabaseUnavailable, StorageFull
from store import cache
from store.collector import Collector, Retention, collect
from store.database import Database, migrate
from store.file_store import FileStore
from store.settings import Settings, keep_private, settings_or_exit


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser("migrate", help="make or upgrade the tables")
    collecting = commands.add_parser("collect", help="delete the files that nothing needs any more")
    collecting.add_argument("--dry-run", action="store_true", help="only list them")
    arguments = parser.parse_args()
    (settings,) = settings_or_exit("store")
    keep_private(settings)
    if arguments.command == "migrate":
        _migrate(settings.database_url)
    else:
        _collect(settings, arguments.dry_run)


def _migrate(url: str) -> None:
    migrate(url)
    print(f"{make_url(url).render_as_string(hide_password=True)} is up to date")


def _collect(settings: Settings, dry_run: bool) -> None:
    def report(kind: str, path: Path, bytes: int) -> None:
        print(f"{kind}\t{bytes}\t{path}")

    database = Database(settings.database_url)
    collector = Collector(database, FileStore(settings.files), Retention.of(settings), dry_run, report=report)
    try:
        if dry_run:
            collector.run()
        else:
            collect(collector, every_s=0)
    except (DatabaseUnavailable, StorageFull) as error:
        sys.exit(f"store: {error}")
    except DBAPIError as error:
        sys.exit(f"store: the database does not have the expected tables; run `python -m store migrate`: {error.orig}")
    finally:
        database.dispose()
    for entry in cache.trim(settings.home / "cache", settings.cache_max_bytes, dry_run):
        report("cache", entry.folder, entry.size.bytes)
    if collector.faults:
        sys.exit("\n".join(f"store: {fault}" for fault in collector.faults))


if __name__ == "__main__":
    main()
