"""The registry: models (teachers) and data sets. An entry gives an inspected file a name, unique in its project.

The results of inspections are cached here as well, by digest, so that no file is inspected twice in the same way; and
what was measured once, by project, so that later jobs need not measure it again.
"""

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, and_, delete, or_, select

from store import tables
from store.errors import NameTaken, NotFound
from store.records import PageQuery, as_record, columns, database_now, new_id, read_page, upsert


@dataclass(frozen=True)
class NewEntry:
    """A file that was inspected, to be registered."""

    project: str
    name: str
    sha256: str
    facts: dict[str, Any]
    """The results of the file's inspection."""
    warnings: list[dict[str, Any]]
    """What is doubtful about it (`base/warning.py`)."""


@dataclass(frozen=True)
class Entry(NewEntry):
    id: str
    created_at: float


class Model(Entry):
    """`facts` are the engine's ModelFacts."""


class Dataset(Entry):
    """`facts` are the engine's DatasetFacts."""


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Registry(Generic[E]):
    """The functions of one table of entries."""

    table: Table
    record: type[E]
    kind: str
    prefix: str

    def register(self, connection: Connection, new: NewEntry) -> E:
        """Add an entry. Raises NameTaken if the project already has one of this name."""
        values = {"id": new_id(self.prefix), **vars(new)}
        added = upsert(connection, self.table).values(**values, created_at=database_now()).on_conflict_do_nothing()
        row = connection.execute(added.returning(*self._columns())).one_or_none()
        if row is None:
            raise NameTaken(self.kind, new.name)
        return as_record(self.record, row)

    def get(self, connection: Connection, project: str, name_or_id: str) -> E:
        row = connection.execute(select(*self._columns()).where(self._is(project, name_or_id))).one_or_none()
        if row is None:
            raise NotFound(self.kind, name_or_id)
        return as_record(self.record, row)

    def list_page(self, connection: Connection, project: str, query: PageQuery) -> tuple[list[E], str | None]:
        """Return a page of entries, newest first, and the `after` of the next page, None at the end."""
        return read_page(connection, self.table, self.record, query, self.table.c.project == project)

    def delete(self, connection: Connection, project: str, name_or_id: str) -> None:
        """Delete an entry. Jobs name digests, so no job is affected."""
        deleted = delete(self.table).where(self._is(project, name_or_id)).returning(self.table.c.id)
        if connection.execute(deleted).one_or_none() is None:
            raise NotFound(self.kind, name_or_id)

    def _is(self, project: str, name_or_id: str) -> ColumnElement[bool]:
        rows = self.table.c
        return and_(rows.project == project, or_(rows.id == name_or_id, rows.name == name_or_id))

    def _columns(self) -> list[Any]:
        return columns(self.table, self.record)


models = Registry(tables.models, Model, "model", "mdl")
datasets = Registry(tables.datasets, Dataset, "data set", "ds")


def get_inspection(connection: Connection, digest: str, kind: str, key: str = "") -> dict[str, Any] | None:
    rows = tables.inspections
    query = select(rows.c.facts).where(rows.c.digest == digest, rows.c.kind == kind, rows.c.key == key)
    facts: dict[str, Any] | None = connection.execute(query).scalar_one_or_none()
    return facts


def put_inspection(connection: Connection, digest: str, kind: str, key: str, facts: dict[str, Any]) -> None:
    """Store the result of an inspection. It replaces an earlier one."""
    values = {"digest": digest, "kind": kind, "key": key, "facts": facts, "seen_at": database_now()}
    added = upsert(connection, tables.inspections).values(**values)
    replaced = {"facts": added.excluded.facts, "seen_at": added.excluded.seen_at}
    connection.execute(added.on_conflict_do_update(index_elements=["digest", "kind", "key"], set_=replaced))


Measured = Literal["evaluation", "cost"]


def get_measurement(connection: Connection, project: str, kind: Measured, key: str) -> dict[str, Any] | None:
    """Return the figures under a key (a SHA-256 of all that decides them); None if nothing was measured."""
    rows = tables.measurements.c
    query = select(rows.figures).where(rows.project == project, rows.kind == kind, rows.key == key)
    figures: dict[str, Any] | None = connection.execute(query).scalar_one_or_none()
    return figures


def put_measurement(connection: Connection, project: str, kind: Measured, key: str, figures: dict[str, Any]) -> None:
    """Store figures. They replace earlier ones."""
    values = {"project": project, "kind": kind, "key": key, "figures": figures, "measured_at": database_now()}
    added = upsert(connection, tables.measurements).values(**values)
    replaced = {"figures": added.excluded.figures, "measured_at": added.excluded.measured_at}
    connection.execute(added.on_conflict_do_update(index_elements=["project", "kind", "key"], set_=replaced))
