"""A shelf of inspected bytes, by name. Models and data sets are kept alike: a name, unique in its project, a digest."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Table, delete, or_, select

from store.clock import database_now
from store.conflict import insert
from store.errors import NameTaken, NotFound
from store.ids import new_id
from store.rows import as_record, columns


@dataclass(frozen=True)
class Entry:
    id: str
    project: str
    name: str
    sha256: str
    facts: dict[str, Any]
    """What an inspection saw in the bytes."""
    created_at: float


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Registry(Generic[E]):
    table: Table
    record: type[E]
    kind: str
    prefix: str

    def register(self, connection: Connection, project: str, name: str, sha256: str, facts: dict[str, Any]) -> E:
        """Give bytes a name; NameTaken where the project has it already."""
        row = {"id": new_id(self.prefix), "project": project, "name": name, "sha256": sha256, "facts": facts}
        adding = insert(connection, self.table).values(**row, created_at=database_now()).on_conflict_do_nothing()
        added = connection.execute(adding.returning(*self._columns())).one_or_none()
        if added is None:
            raise NameTaken(self.kind, name)
        return as_record(self.record, added)

    def get(self, connection: Connection, project: str, name_or_id: str) -> E:
        row = connection.execute(select(*self._columns()).where(*self._is(project, name_or_id))).one_or_none()
        if row is None:
            raise NotFound(self.kind, name_or_id)
        return as_record(self.record, row)

    def list_page(
        self, connection: Connection, project: str, *, limit: int, after: str | None = None
    ) -> tuple[list[E], str | None]:
        """Newest first, from behind the id `after`; and the id to go on behind, or None at the end."""
        wanted = select(*self._columns()).where(self.table.c.project == project)
        if after is not None:
            wanted = wanted.where(self.table.c.id < after)
        rows = connection.execute(wanted.order_by(self.table.c.id.desc()).limit(limit + 1)).all()
        found = [as_record(self.record, row) for row in rows[:limit]]
        return found, found[-1].id if len(rows) > limit else None

    def delete(self, connection: Connection, project: str, name_or_id: str) -> None:
        """Forget the name. Jobs hold digests, so none is touched by it."""
        gone = delete(self.table).where(*self._is(project, name_or_id)).returning(self.table.c.id)
        if connection.execute(gone).one_or_none() is None:
            raise NotFound(self.kind, name_or_id)

    def _is(self, project: str, name_or_id: str) -> tuple[ColumnElement[bool], ...]:
        return (
            self.table.c.project == project,
            or_(self.table.c.id == name_or_id, self.table.c.name == name_or_id),
        )

    def _columns(self) -> list[Any]:
        return list(columns(self.table, self.record))
