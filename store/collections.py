"""The collector's runs: one row for each of the newest hundred. The rows also ensure that only one runs at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, exists, func, insert, or_, select, text, update

from store import tables
from store.records import as_record, columns, database_now, new_id

MAX_ROWS = 100

Removed = dict[str, dict[str, int]]
"""`count` and `bytes` by kind of file."""


@dataclass(frozen=True)
class Collection:
    """One row of `collections`."""

    id: str
    host: str
    began_at: float
    ended_at: float | None
    """None while it runs, or if it was killed (the next collection removes the rest)."""
    removed: Removed | None
    error: str | None


COLLECTION_COLUMNS = columns(tables.collections, Collection)
_rows = tables.collections.c
_NEWEST_FIRST = (_rows.began_at.desc(), _rows.id.desc())


def list_collections(connection: Connection, limit: int = MAX_ROWS) -> Sequence[Collection]:
    """Return collections, newest first."""
    newest = select(*COLLECTION_COLUMNS).order_by(*_NEWEST_FIRST).limit(limit)
    return [as_record(Collection, row) for row in connection.execute(newest)]


def is_due(connection: Connection, every_s: float) -> bool:
    """Return whether no collection has begun within `every_s`. Takes no lock."""
    return not connection.execute(select(_began_within(every_s))).scalar_one()


def begin(connection: Connection, host: str, every_s: float) -> str | None:
    """Add the row of a new collection. Returns its id, or None if another has begun within `every_s`."""
    if connection.dialect.name == "postgresql":
        # Two transactions at the same time would not see each other's row.
        connection.execute(text("LOCK TABLE collections IN SHARE ROW EXCLUSIVE MODE"))
    if not is_due(connection, every_s):
        return None
    row = {"id": new_id("col"), "host": host}
    connection.execute(insert(tables.collections).values(**row, began_at=database_now()))
    return row["id"]


def end(connection: Connection, collection_id: str, removed: Removed, error: str | None = None) -> None:
    """Write what a collection has removed, and delete the oldest rows."""
    ended = update(tables.collections).where(_rows.id == collection_id)
    connection.execute(ended.values(ended_at=database_now(), removed=removed, error=error))
    newest = select(_rows.id).order_by(*_NEWEST_FIRST).limit(MAX_ROWS)
    connection.execute(delete(tables.collections).where(_rows.id.not_in(newest)))


def has_collected_for(connection: Connection, duration_s: float) -> bool:
    """Return whether this database has a row of that age, or the largest number of rows."""
    oldest = func.coalesce(func.min(_rows.began_at), database_now())
    long_enough = or_(oldest <= database_now() - duration_s, func.count() >= MAX_ROWS)
    return bool(connection.execute(select(long_enough).select_from(tables.collections)).scalar_one())


def _began_within(duration_s: float) -> ColumnElement[bool]:
    # A start in the future comes from a wrong clock. It must not delay collections until that time.
    return exists().where(_rows.began_at > database_now() - duration_s, _rows.began_at <= database_now())
