"""A copy of the whole service while it runs, and a new service made of it.

    rows-….jsonl.gz  every row, as of one moment: a line with its table, then its values
    files/           the files that these rows name, at their places in the file store
    manifest.json    revision, counts, and the digest of the rows: written when all is there that it names

The rows are read in one transaction, then the files are copied that they name. Blobs and checkpoints never change, but
the service may delete one before it is copied, because it has become needless since. Then the rows are read again, and
only what is new is copied. So a further backup into the same folder copies new files only.

The rows are plain values, so a backup of SQLite restores into PostgreSQL, and the other way round. It is restored at
its own revision, and then migrated. What is not part of it: caches, which are made again, and the rows of workers.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alembic.runtime.migration import MigrationContext
from sqlalchemy import JSON, Connection, MetaData, Select, Table, delete, func, insert, select, text

from base.files import files_in, make_folder, sha256_of, sync, write_text, write_whole
from store import tables
from store.collector import named_in
from store.database import Database, migrate
from store.file_store import FileStore

ROWS, FILES, MANIFEST = "rows-{}.jsonl.gz", "files", "manifest.json"
NEW_ROWS = ROWS.format("new")
ROUNDS = 10
BATCH = 500
VERSION = "alembic_version"
LEFT_OUT = (VERSION, "workers")


class BackupFault(Exception):
    """The backup cannot be made, or is not whole, or there is no place for it."""


@dataclass(frozen=True)
class Manifest:
    revision: str
    rows: dict[str, int]
    """The number of rows of each table."""
    rows_sha256: str
    files: int
    bytes: int

    @property
    def rows_name(self) -> str:
        return ROWS.format(self.rows_sha256[:16])


@dataclass(frozen=True)
class _Named:
    """A file that a row names. `sha256` is None if it may still grow: then its first `bytes` count."""

    path: str
    sha256: str | None = None
    bytes: int = 0
    needed: bool = True


def back_up(database: Database, files: FileStore, folder: Path) -> Manifest:
    """Copy the rows and their files into a folder, which may have an earlier backup. Raises BackupFault."""
    make_folder(folder / FILES)
    copied: dict[str, int] = {}
    missing: list[str] = []
    for _ in range(ROUNDS):
        # Read again after a file that was deleted meanwhile: no row names it any more.
        revision, counts, named, rows_sha256 = _write_rows(database, folder / NEW_ROWS)
        before, missing = missing, []
        copied = {}
        for one in named:
            size = _copy(files.folder / one.path, folder / FILES / one.path, one)
            if size is not None:
                copied[one.path] = size
            elif one.needed:
                missing.append(one.path)
        if not missing:
            break
        if missing == before:
            shown = ", ".join(missing[:5])
            raise BackupFault(f"the file store lacks {len(missing)} files that rows name, or they are damaged: {shown}")
    else:
        raise BackupFault(f"files are deleted faster than they are copied: {', '.join(missing[:5])}")
    manifest = Manifest(revision, counts, rows_sha256, len(copied), sum(copied.values()))
    (folder / NEW_ROWS).replace(folder / manifest.rows_name)
    write_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
    # From here on this is the backup. What an earlier one had besides is needless.
    for path in folder.glob(ROWS.format("*")):
        if path.name != manifest.rows_name:
            path.unlink()
    for path in list(files_in(folder / FILES)):
        if path.relative_to(folder / FILES).as_posix() not in copied:
            path.unlink()
    return manifest


def restore(url: str, files: FileStore, folder: Path) -> Manifest:
    """Make a new service of a backup: its files, its rows at their revision, then the migration. Raises BackupFault.

    The rows come last: a restore that was interrupted leaves a service without them, and can be begun again.
    """
    manifest = _read_manifest(folder)
    _require_empty(url)
    for source in files_in(folder / FILES):
        target = files.folder / source.relative_to(folder / FILES)
        make_folder(target.parent)
        shutil.copyfile(source, target)
        sync(target)
    for blob in (files.folder / "blobs").glob("*/*"):
        if sha256_of(blob) != blob.name:
            raise BackupFault(f"the blob {blob.name} of the backup is damaged")
    migrate(url, manifest.revision)
    database = Database(url)
    try:
        with database.begin() as connection:
            counts = _insert_rows(connection, folder / manifest.rows_name)
            if counts != manifest.rows:
                raise BackupFault(f"the backup has other rows than its manifest says: {counts}")
    finally:
        database.dispose()
    migrate(url)
    return manifest


def _write_rows(database: Database, path: Path) -> tuple[str, dict[str, int], list[_Named], str]:
    """Write every row as of one moment. Returns the revision, the counts, the files that they name, and the digest."""
    counts: dict[str, int] = {}
    with database.connect() as connection:
        if not database.is_sqlite:
            connection.execution_options(isolation_level="REPEATABLE READ")
            connection.execute(text("SET LOCAL statement_timeout = 0"))
        revision = MigrationContext.configure(connection).get_current_revision()
        if revision is None:
            raise BackupFault("the database has no tables; `python -m store migrate` makes them")

        def write(temporary: Path) -> None:
            # Without the time in the header, equal rows are equal bytes.
            with temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as out:
                for table, values in _rows(connection):
                    counts[table] = counts.get(table, 0) + 1
                    out.write(json.dumps([table, values]).encode() + b"\n")

        written = write_whole(path, write)
        return revision, counts, list(_named(connection)), written.sha256


def _rows(connection: Connection) -> Iterator[tuple[str, dict[str, Any]]]:
    for table in _reflected(connection).sorted_tables:
        result = connection.execute(select(table), execution_options={"yield_per": BATCH})
        for row in result.mappings():
            yield table.name, dict(row)


def _reflected(connection: Connection) -> MetaData:
    """Return the tables as they are in this database, in which a revision of its own may be. Null is SQL's null."""
    found = MetaData()
    found.reflect(connection, only=lambda name, _: name not in LEFT_OUT)
    for table in found.tables.values():
        for column in table.columns:
            if isinstance(column.type, JSON):
                column.type.none_as_null = True
    return found


def _named(connection: Connection) -> Iterator[_Named]:
    for digest in sorted({digest for pairs in named_in(connection) for _, digest in pairs if digest}):
        yield _Named(f"blobs/{digest[:2]}/{digest}", digest)
    rows = tables.checkpoints.c
    for path, sha256 in connection.execute(select(rows.path, rows.sha256)):
        yield _Named(path, sha256)
    sent = tables.uploads.c
    for upload_id, offset in connection.execute(
        select(sent.id, sent.offset).where(sent.status == "open", sent.offset > 0)
    ):
        yield _Named(f"uploads/{upload_id}", bytes=offset)
    attempts = tables.job_attempts.c
    for job_id, fence in connection.execute(select(attempts.job_id, attempts.fence)):
        # The first line of an attempt makes its log.
        yield _Named(f"logs/{job_id}/{fence}.log", needed=False)


def _copy(source: Path, target: Path, named: _Named) -> int | None:
    """Copy a file. Returns its size; None if it is missing, or has other bytes than its digest says."""
    if named.sha256 is not None and target.is_file():
        return target.stat().st_size
    size = 0
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        nonlocal size
        with source.open("rb") as read, temporary.open("wb") as out:
            while piece := read.read(1 << 20):
                digest.update(piece)
                size += out.write(piece)

    try:
        written = write_whole(target, write)
    except FileNotFoundError:
        return None
    if named.sha256 not in (None, digest.hexdigest()) or written.bytes < named.bytes:
        target.unlink()
        return None
    return size


def _read_manifest(folder: Path) -> Manifest:
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BackupFault(f"{folder} has no whole backup: {error}") from error
    rows = folder / manifest.rows_name
    if not rows.is_file() or sha256_of(rows) != manifest.rows_sha256:
        raise BackupFault(f"{rows} is missing, or is not what {MANIFEST} says")
    found = list(files_in(folder / FILES))
    if len(found) < manifest.files:
        raise BackupFault(f"{folder / FILES} has {len(found)} files, not {manifest.files}")
    return manifest


def _require_empty(url: str) -> None:
    """Raise BackupFault if the database is in use: rows of two services cannot be separated again."""
    database = Database(url)
    if database.is_sqlite and not Path(database.url.database or "").exists():
        return
    try:
        with database.connect() as connection:
            found = _reflected(connection).sorted_tables
            # A migration makes the project `default`.
            used = [table.name for table in found if table.name != "projects" and connection.scalar(_count(table))]
    finally:
        database.dispose()
    if used:
        raise BackupFault(f"the database has rows already, in {', '.join(used[:5])}; restore into a new one")


def _count(table: Table) -> Select[int]:
    return select(func.count()).select_from(table)


def _insert_rows(connection: Connection, path: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    reflected = _reflected(connection)
    for table in reversed(reflected.sorted_tables):
        connection.execute(delete(table))  # What the migrations made is part of the backup, too.
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for batch in _batches(lines):
            name = batch[0][0]
            counts[name] = counts.get(name, 0) + len(batch)
            connection.execute(insert(reflected.tables[name]), [values for _, values in batch])
    return counts


def _batches(lines: Iterator[str]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Yield the rows in batches, each of one table."""
    batch: list[tuple[str, dict[str, Any]]] = []
    for line in lines:
        name, values = json.loads(line)
        if batch and (batch[0][0] != name or len(batch) == BATCH):
            yield batch
            batch = []
        batch.append((name, values))
    if batch:
        yield batch
