"""What the collector did and when: one row a run, the newest hundred. They also see to it that one runs at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, delete, exists, func, insert, or_, select, text, update

from store import tables
from store.clock import database_now
from store.ids import new_id
from store.rows import as_record, columns

KEPT = 100


@dataclass(frozen=True)
class Collection:
    id: str
    host: str
    began_at: float
    ended_at: float | None
    """None while it runs, and for ever where it was killed: the next one does what was left."""
    removed: dict[str, dict[str, int]] | None
    """By kind, `count` and `bytes` of what went."""
    error: str | None


COLLECTION = columns(tables.collections, Collection)
_runs = tables.collections.c


def list(connection: Connection, limit: int = KEPT) -> Sequence[Collection]:
    """The newest first."""
    wanted = select(*COLLECTION).order_by(_runs.began_at.desc(), _runs.id.desc()).limit(limit)
    return [as_record(Collection, row) for row in connection.execute(wanted)]


def due(connection: Connection, every_s: float) -> bool:
    """Whether nobody has begun for so long; takes no lock."""
    return not connection.execute(select(_began_within(every_s))).scalar_one()


def begin(connection: Connection, host: str, every_s: float) -> str | None:
    """The id of a collection that is ours to run; None where somebody began one within `every_s`."""
    if connection.dialect.name == "postgresql":
        # Two that began at once would not see each other's row.
        connection.execute(text("LOCK TABLE collections IN SHARE ROW EXCLUSIVE MODE"))
    if not due(connection, every_s):
        return None
    new = {"id": new_id("col"), "host": host}
    connection.execute(insert(tables.collections).values(**new, began_at=database_now()))
    return new["id"]


def end(connection: Connection, id: str, removed: dict[str, Any], error: str | None = None) -> None:
    """Say what one has removed, and forget all but the newest."""
    done = update(tables.collections).where(_runs.id == id)
    connection.execute(done.values(ended_at=database_now(), removed=removed, error=error))
    newest = select(_runs.id).order_by(_runs.began_at.desc(), _runs.id.desc()).limit(KEPT)
    connection.execute(delete(tables.collections).where(_runs.id.not_in(newest)))


def known_for(connection: Connection, duration_s: float) -> bool:
    """Whether this database has seen collections for so long, or as many as it keeps."""
    oldest = func.coalesce(func.min(_runs.began_at), database_now())
    seen = or_(oldest <= database_now() - duration_s, func.count() >= KEPT)
    return bool(connection.execute(select(seen).select_from(tables.collections)).scalar_one())


def _began_within(duration_s: float) -> ColumnElement[bool]:
    # One that began in the future met a clock that was wrong, and must not hold up the others until then.
    return exists().where(_runs.began_at > database_now() - duration_s, _runs.began_at <= database_now())
