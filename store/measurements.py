"""What was measured once, so that later jobs need not measure it again. By project: none learns what another has."""

from typing import Any, Literal

from sqlalchemy import Connection, select

from store import tables
from store.records import database_now, upsert

Kind = Literal["evaluation", "cost"]


def get(connection: Connection, project: str, kind: Kind, key: str) -> dict[str, Any] | None:
    """Return the figures under a key (a SHA-256 of all that decides them); None if nothing was measured."""
    rows = tables.measurements.c
    query = select(rows.figures).where(rows.project == project, rows.kind == kind, rows.key == key)
    figures: dict[str, Any] | None = connection.execute(query).scalar_one_or_none()
    return figures


def put(connection: Connection, project: str, kind: Kind, key: str, figures: dict[str, Any]) -> None:
    """Store figures. They replace earlier ones."""
    values = {"project": project, "kind": kind, "key": key, "figures": figures, "measured_at": database_now()}
    added = upsert(connection, tables.measurements).values(**values)
    replaced = {"figures": added.excluded.figures, "measured_at": added.excluded.measured_at}
    connection.execute(added.on_conflict_do_update(index_elements=["project", "kind", "key"], set_=replaced))
