"""Commands for operators.

python -m store migrate              bring the database to the newest revision
python -m store collect [--dry-run]  delete the files that are not needed any more, or only list them
python -m store backup FOLDER        copy rows and files while the service runs; again: copy what is new
python -m store restore FOLDER       make a new service of a backup, in an empty database and home
python -m store key NAME             make an API key: the first one, or another where all are lost
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from base.defaults import DEFAULT_PROJECT
from base.errors import DatabaseUnavailable, StorageFull
from base.text import unwanted
from base.wire import Role
from store import audit, backup, cache, keys
from store.backup import BackupFault, Manifest
from store.collector import Collector, Retention, collect
from store.database import Database, migrate
from store.errors import NotFound
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
    backing_up = commands.add_parser("backup", help="copy rows and files into a folder while the service runs")
    restoring = commands.add_parser("restore", help="make a new service of a backup")
    for command in (backing_up, restoring):
        command.add_argument("folder", type=Path)
    making = commands.add_parser("key", help="make an API key, without a server; makes the tables if there are none")
    making.add_argument("name", help="whose it is, as it is shown on jobs")
    making.add_argument("--role", choices=get_args(Role), default="operator", help="default: operator")
    making.add_argument("--project", default=DEFAULT_PROJECT, help=f"default: {DEFAULT_PROJECT}")
    arguments = parser.parse_args()
    (settings,) = settings_or_exit("store")
    keep_private(settings)
    match arguments.command:
        case "migrate":
            _migrate(settings.database_url)
        case "key":
            _make_key(settings, arguments.project, arguments.name, arguments.role)
        case "collect":
            _collect(settings, arguments.dry_run)
        case "backup":
            _back_up(settings, arguments.folder.absolute())
        case "restore":
            _restore(settings, arguments.folder.absolute())


def _migrate(url: str) -> None:
    migrate(url)
    print(f"{make_url(url).render_as_string(hide_password=True)} is up to date")


def _back_up(settings: Settings, folder: Path) -> None:
    database = Database(settings.database_url)
    try:
        _print_manifest("copied", backup.back_up(database, FileStore(settings.files), folder))
    except (BackupFault, DatabaseUnavailable, StorageFull) as error:
        sys.exit(f"store: {error}")
    finally:
        database.dispose()


def _restore(settings: Settings, folder: Path) -> None:
    try:
        _print_manifest("restored", backup.restore(settings.database_url, FileStore(settings.files), folder))
    except (BackupFault, DatabaseUnavailable, StorageFull) as error:
        sys.exit(f"store: {error}")


def _print_manifest(done: str, manifest: Manifest) -> None:
    print(f"{done} {sum(manifest.rows.values())} rows and {manifest.files} files ({manifest.bytes} bytes)")


def _make_key(settings: Settings, project: str, name: str, role: Role) -> None:
    if fault := unwanted(name) or (None if 1 <= len(name) <= 100 else "it has 1 to 100 characters"):
        sys.exit(f"store: NAME: {fault}")
    database = Database(settings.database_url)
    try:
        migrate(settings.database_url)
        with database.begin() as connection:
            key, secret = keys.create(connection, project, name, role, created_by="python -m store key")
            actor = audit.Actor(project, None, "python -m store key", "operator", None, None)
            audit.append(connection, actor, "key.create", key.id, name=name, role=role)
    except (DatabaseUnavailable, StorageFull, NotFound) as error:
        sys.exit(f"store: {error}")
    finally:
        database.dispose()
    print(f"{key.id} has the role {role} in the project {project}. It is shown only now:", file=sys.stderr)
    print(secret)


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
