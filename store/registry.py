"""The registry: models (teachers) and data sets. An entry gives a file a name, unique in its project.

           register                       finish
    ───────────────────► inspecting ───────────────────► ready
                           ▲    │         refuse
       claim_expired       └────┴───────────────────────► refused, until the name is registered again

A row is made before its file is inspected. The server that inspects it holds a lease, which it extends; when it has
expired, any server may take the inspection over. A server's writes name itself and the number of the attempt, so what
it writes after that has no effect.

The results of inspections are cached here as well, by digest, so that no file is inspected twice in the same way; and
what was measured once, by project, so that later jobs need not measure it again.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field
from sqlalchemy import ColumnElement, Connection, Table, and_, case, delete, func, null, or_, select, update

from base.text import Text
from store import idempotency, limits, projects, tables
from store.errors import NameTaken, NotFound
from store.idempotency import Once
from store.lists import (
    NEWEST_FIRST,
    Filter,
    Rows,
    facts_summary_of,
    page_of_ids,
    put_facets,
    within_bytes,
)
from store.records import LabelledQuery, as_record, columns, database_now, new_id, upsert

State = Literal["inspecting", "ready", "refused"]

NO_OWNER: dict[str, Any] = {"owner": None, "lease_until": None, "progress": None}


@dataclass(frozen=True)
class NewEntry:
    """An uploaded file that is to be registered."""

    project: str
    name: str
    sha256: str
    request: dict[str, Any]
    """The body of the registration."""
    labels: dict[str, str]
    """Names and values to find it by."""


@dataclass(frozen=True)
class Entry(NewEntry):
    id: str
    state: State
    attempts: int
    """How many times the inspection was begun."""
    progress: dict[str, int] | None
    """`done` and `total` images of an inspection that counts them."""
    error: dict[str, Any] | None
    """Why it is refused; of an entry that is being inspected, how the attempt before has ended."""
    summary: dict[str, Any] | None
    """The facts that a list shows."""
    facts: dict[str, Any] | None
    """The results of the inspection; None before its end, and in a list of summaries."""
    warnings: list[dict[str, Any]]
    """What is doubtful about it (`base/warning.py`)."""
    created_at: float


@dataclass(frozen=True)
class Model(Entry):
    """`facts` are the engine's ModelFacts."""


@dataclass(frozen=True)
class Dataset(Entry):
    """`facts` are the engine's DatasetFacts."""

    thumbnails: dict[str, Any] | None
    """The digest of their sheet, and the places in it (`api.inspections.Thumbnails`)."""


class EntryQuery(LabelledQuery):
    """The page and the filters of a list of models or data sets, as query parameters."""

    state: State | None = None
    name: Annotated[str, Text(100)] | None = Field(default=None, description="The beginning of the name.")
    view: Literal["summary", "full"] = Field(
        default="summary", description="full: with all facts. A page then ends early after some megabytes of them."
    )

    def filters(self, rows: Rows) -> Iterator[Filter]:
        if self.state is not None:
            yield rows.where("state", lambda state: state == self.state)
        if self.name is not None:
            yield rows.where("name", lambda name: func.substr(name, 1, len(self.name or "")) == self.name)
        yield from rows.with_labels(self.labels)


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Registry(Generic[E]):
    """The functions of one table of entries."""

    table: Table
    facets: Table
    record: type[E]
    kind: str
    prefix: str

    def register_once(
        self,
        connection: Connection,
        once: Once | None,
        new: NewEntry,
        owner: str,
        lease_s: float,
        max_inspections: int | None = None,
    ) -> tuple[E, bool]:
        """Add an entry as `register` does, and return it; with False if the request was executed before.

        Raises LimitReached if the project has `max_inspections` entries that are inspected.
        """
        entry_id = new_id(self.prefix)
        if (known := idempotency.reserve(connection, once, entry_id)) is not None:
            return self.get(connection, new.project, known), False
        limits.require_inspection(connection, new.project, max_inspections)
        return self.register(connection, new, owner, lease_s, entry_id), True

    def find_once(self, connection: Connection, once: Once) -> E | None:
        """Return the entry that was registered by this request before, if any. Raises IdempotencyConflict."""
        known = idempotency.find(connection, once)
        return None if known is None else self.get(connection, once.project, known)

    def register(
        self, connection: Connection, new: NewEntry, owner: str, lease_s: float, entry_id: str | None = None
    ) -> E:
        """Add an entry that its owner inspects. It replaces a refused one of its name.

        Raises NameTaken if the project has another one of this name.
        """
        rows = self.table.c
        refused = and_(rows.project == new.project, rows.name == new.name, rows.state == "refused")
        connection.execute(delete(self.table).where(refused))
        values: dict[str, Any] = {
            "id": entry_id or new_id(self.prefix),
            **vars(new),
            "state": "inspecting",
            "owner": owner,
        }
        times = {"lease_until": database_now() + lease_s, "created_at": database_now()}
        added = upsert(connection, self.table).values(**values, **times, attempts=1).on_conflict_do_nothing()
        row = connection.execute(added.returning(*self._columns())).one_or_none()
        if row is None:
            raise NameTaken(self.kind, new.name)
        projects.add_blobs(connection, new.project, [new.sha256])
        entry = as_record(self.record, row)
        put_facets(connection, self.facets, entry, ())
        return entry

    def get(self, connection: Connection, project: str, name_or_id: str) -> E:
        row = connection.execute(select(*self._columns()).where(self._is_named(project, name_or_id))).one_or_none()
        if row is None:
            raise NotFound(self.kind, name_or_id)
        return as_record(self.record, row)

    def names(self, connection: Connection, project: str, digests: Collection[str]) -> list[tuple[str, str]]:
        """Return digests with the names under which they are registered; of several names the newest is the last."""
        rows = self.table.c
        of_these = and_(rows.project == project, rows.sha256.in_(digests))
        found = connection.execute(select(rows.sha256, rows.name).where(of_these).order_by(rows.created_at, rows.id))
        return [(str(digest), str(name)) for digest, name in found]

    def list_page(self, connection: Connection, project: str, query: EntryQuery) -> tuple[list[E], str | None]:
        """Return a page of entries, newest first, and the `after` of the next page, None at the end.

        Without `view=full` they have no `facts`, but a summary; with it, a page ends after some megabytes of facts.
        """
        rows = Rows(self.table, self.facets, project)
        filters = tuple(query.filters(rows))
        ids, following = page_of_ids(connection, rows, filters, NEWEST_FIRST, query.after, query.limit)
        full = query.view == "full"
        fitting = within_bytes(connection, self.table, (self.table.c.facts,), ids) if full and ids else ids
        shown = [column if full or column.name != "facts" else null() for column in self._columns()]
        read = (
            select(*shown)
            .where(self.table.c.id.in_(fitting))
            .order_by(self.table.c.created_at.desc(), self.table.c.id.desc())
        )
        page = [as_record(self.record, row) for row in connection.execute(read)] if fitting else []
        if page and len(fitting) < len(ids):
            following = NEWEST_FIRST.cursor(page[-1].created_at, page[-1].id)
        return page, following

    def relabel(self, connection: Connection, project: str, name_or_id: str, labels: dict[str, str]) -> E:
        """Replace the labels of an entry, in any state."""
        changed = update(self.table).where(self._is_named(project, name_or_id)).values(labels=labels)
        row = connection.execute(changed.returning(*self._columns())).one_or_none()
        if row is None:
            raise NotFound(self.kind, name_or_id)
        entry = as_record(self.record, row)
        put_facets(connection, self.facets, entry, ())
        return entry

    def delete(self, connection: Connection, project: str, name_or_id: str) -> str:
        """Delete an entry in any state, and return its id. Jobs name digests, so no job is affected."""
        deleted = delete(self.table).where(self._is_named(project, name_or_id)).returning(self.table.c.id)
        entry_id: str | None = connection.execute(deleted).scalar_one_or_none()
        if entry_id is None:
            raise NotFound(self.kind, name_or_id)
        return entry_id

    # What the server that inspects an entry does with it: `owner` and the entry's `attempts` tell whether it still may.

    def finish(self, connection: Connection, entry: E, owner: str, found: Mapping[str, Any]) -> E | None:
        """Make an entry ready with what was found (`facts`, `warnings`, …). Returns None if it is not the owner's."""
        shown = {"summary": facts_summary_of(found["facts"])} if found.get("facts") else {}
        ended = self._end(connection, entry, owner, {**NO_OWNER, "state": "ready", "error": None, **shown, **found})
        if ended is not None and (sheet := found.get("thumbnails")):
            projects.add_blobs(connection, entry.project, [sheet["sha256"]])
        return ended

    def refuse(self, connection: Connection, entry: E, owner: str, error: dict[str, Any]) -> E | None:
        """Keep an entry with the reason why it cannot be used. Returns None if it is not the owner's."""
        return self._end(connection, entry, owner, {**NO_OWNER, "state": "refused", "error": error})

    def withdraw(self, connection: Connection, entry: E, owner: str) -> bool:
        """Delete an entry that cannot be used. Returns False if it is not the owner's."""
        deleted = delete(self.table).where(self._inspected_by(entry, owner)).returning(self.table.c.id)
        return connection.execute(deleted).one_or_none() is not None

    def release(
        self, connection: Connection, entry: E, owner: str, in_s: float, error: dict[str, Any] | None = None
    ) -> None:
        """Let any server begin the inspection again after this time. With an error, the attempt has counted."""
        values: dict[str, Any] = {"owner": None, "lease_until": database_now() + in_s}
        values |= {"attempts": entry.attempts - 1} if error is None else {"error": error}
        connection.execute(update(self.table).where(self._inspected_by(entry, owner)).values(**values))

    def renew(
        self, connection: Connection, owner: str, lease_s: float, progress: Mapping[str, dict[str, int] | None]
    ) -> set[str]:
        """Extend the leases of an owner and write how far its inspections are, by id. Returns the ids that it owns."""
        rows = self.table.c
        extended = update(self.table).where(
            rows.owner == owner, rows.state == "inspecting", rows.id.in_(list(progress))
        )
        extended = extended.values(lease_until=database_now() + lease_s).returning(rows.id, rows.progress)
        owned = connection.execute(extended).all()
        for row in owned:
            if progress[row.id] != row.progress:
                changed = update(self.table).where(rows.id == row.id, rows.owner == owner)
                connection.execute(changed.values(progress=progress[row.id]))
        return {row.id for row in owned}

    def has_expired(self, connection: Connection) -> bool:
        """Return True if an inspection waits for a server."""
        return connection.execute(select(self.table.c.id).where(self._expired()).limit(1)).one_or_none() is not None

    def claim_expired(
        self, connection: Connection, owner: str, lease_s: float, limit: int, max_attempts: int, lost: dict[str, Any]
    ) -> list[E]:
        """Take over the inspections whose lease has expired, the oldest first.

        One that was begun `max_attempts` times is refused, with the error of its last attempt, or with `lost`.
        """
        rows = self.table.c
        waiting = select(rows.id, rows.attempts, rows.error).where(self._expired()).order_by(rows.id).limit(limit)
        claimed = []
        for row in connection.execute(waiting).all():
            # The condition is checked again: another server may have been faster.
            mine = update(self.table).where(rows.id == row.id, self._expired(), rows.attempts == row.attempts)
            if row.attempts >= max_attempts:
                ended = {**NO_OWNER, "state": "refused", "error": row.error or lost}
                connection.execute(mine.values(**ended))
                continue
            taken = {"owner": owner, "attempts": row.attempts + 1, "lease_until": database_now() + lease_s}
            found = connection.execute(mine.values(**taken, progress=None).returning(*self._columns())).one_or_none()
            if found is not None:
                claimed.append(as_record(self.record, found))
        return claimed

    def _end(self, connection: Connection, entry: E, owner: str, values: dict[str, Any]) -> E | None:
        ended = update(self.table).where(self._inspected_by(entry, owner)).values(**values).returning(*self._columns())
        row = connection.execute(ended).one_or_none()
        return None if row is None else as_record(self.record, row)

    def _inspected_by(self, entry: E, owner: str) -> ColumnElement[bool]:
        rows = self.table.c
        mine = and_(rows.owner == owner, rows.attempts == entry.attempts)
        return and_(rows.id == entry.id, rows.state == "inspecting", mine)

    def _expired(self) -> ColumnElement[bool]:
        rows = self.table.c
        return and_(rows.state == "inspecting", rows.lease_until < database_now())

    def _is_named(self, project: str, name_or_id: str) -> ColumnElement[bool]:
        """Match one row: the one of this id, or else of this name. Earlier versions accepted names like ids."""
        rows = self.table.c
        either = and_(rows.project == project, or_(rows.id == name_or_id, rows.name == name_or_id))
        by_id_first = case((rows.id == name_or_id, 0), else_=1)
        found = select(rows.id).where(either).order_by(by_id_first).limit(1).scalar_subquery()
        return rows.id == found

    def _columns(self) -> list[Any]:
        return columns(self.table, self.record)


models = Registry(tables.models, tables.model_facets, Model, "model", "mdl")
datasets = Registry(tables.datasets, tables.dataset_facets, Dataset, "data set", "ds")


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


def is_long_unused(connection: Connection, digest: str, kind: str, key: str, age_s: float) -> bool:
    """Return True if the use of an inspection was not noted for so long."""
    rows = tables.inspections.c
    query = select(rows.kind).where(rows.digest == digest, rows.kind == kind, rows.key == key)
    return connection.execute(query.where(rows.seen_at < database_now() - age_s)).one_or_none() is not None


def note_use(connection: Connection, digest: str, kind: str, key: str) -> None:
    """Note that an inspection, if it is still stored, was used now."""
    rows = tables.inspections
    used = update(rows).where(rows.c.digest == digest, rows.c.kind == kind, rows.c.key == key)
    connection.execute(used.values(seen_at=database_now()))


def count_unused_inspections(connection: Connection, age_s: float) -> int:
    """Return the number of inspections that were not used for so long."""
    return connection.execute(
        select(func.count())
        .select_from(tables.inspections)
        .where(tables.inspections.c.seen_at < database_now() - age_s)
    ).scalar_one()


def delete_unused_inspections(connection: Connection, age_s: float) -> int:
    """Delete the inspections that were not used for so long. Returns their number."""
    return connection.execute(
        delete(tables.inspections).where(tables.inspections.c.seen_at < database_now() - age_s)
    ).rowcount


Measured = Literal["evaluation", "cost", "benchmark", "files"]


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
