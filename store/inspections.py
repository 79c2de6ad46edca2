"""What was seen in bytes, by their digest: nothing is opened twice to answer the same question."""

from typing import Any

from sqlalchemy import Connection, select

from store import tables
from store.clock import database_now
from store.conflict import insert


def get(connection: Connection, digest: str, kind: str, key: str = "") -> dict[str, Any] | None:
    seen = tables.inspections
    kept = select(seen.c.facts).where(seen.c.digest == digest, seen.c.kind == kind, seen.c.key == key)
    facts: dict[str, Any] | None = connection.execute(kept).scalar_one_or_none()
    return facts


def put(connection: Connection, digest: str, kind: str, key: str, facts: dict[str, Any]) -> None:
    """Keep an answer; a later one replaces it."""
    seen = tables.inspections
    adding = insert(connection, seen).values(digest=digest, kind=kind, key=key, facts=facts, seen_at=database_now())
    replacing = {"facts": adding.excluded.facts, "seen_at": adding.excluded.seen_at}
    connection.execute(adding.on_conflict_do_update(index_elements=["digest", "kind", "key"], set_=replacing))
