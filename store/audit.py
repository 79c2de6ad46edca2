"""The audit log: who did what to which resource, when and from where.

Entries are added, and deleted by age; no function changes one.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy import ColumnElement, Connection, delete, insert, select

from base.text import Text
from store import tables
from store.records import Moment, PageQuery, database_now, new_id, read_page

Outcome = Literal["done", "refused"]


@dataclass(frozen=True)
class Actor:
    """The sender of a request. All but the address and the request's id are None for a key that is not known."""

    project: str | None
    key_id: str | None
    key_name: str | None
    role: str | None
    address: str | None
    request_id: str | None


@dataclass(frozen=True)
class Entry(Actor):
    """One row of `audit`."""

    id: str
    at: float
    action: str
    """`<resource>.<verb>`, as in `job.submit`."""
    resource: str | None
    outcome: Outcome
    details: dict[str, Any] = field(default_factory=dict)


class AuditQuery(PageQuery):
    """The page and the filters of the audit log, as query parameters. Filters combine."""

    project: Annotated[str, Text(100)] | None = Field(default=None, description="For the operator. Default: all.")
    action: Annotated[str, Text(64)] | None = Field(default=None, description="As in `job.submit`.")
    resource: Annotated[str, Text(200)] | None = Field(default=None, description="The id or name of what was acted on.")
    key: Annotated[str, Text(100)] | None = Field(default=None, description="The id or name of the sender's key.")
    outcome: Outcome | None = Field(default=None, description="`refused`: an unknown key, or one without the right.")
    since: Moment | None = Field(default=None, description="ISO 8601 with an offset: from this moment on.")
    until: Moment | None = Field(default=None, description="ISO 8601 with an offset: before this moment.")

    def conditions(self) -> Iterator[ColumnElement[bool]]:
        rows = tables.audit.c
        for name in ("project", "action", "resource", "outcome"):
            if (value := getattr(self, name)) is not None:
                yield rows[name] == value
        if self.key is not None:
            yield (rows.key_id == self.key) | (rows.key_name == self.key)
        if self.since is not None:
            yield rows.at >= self.since.timestamp()
        if self.until is not None:
            yield rows.at < self.until.timestamp()


def append(
    connection: Connection,
    /,
    actor: Actor,
    action: str,
    resource: str | None = None,
    outcome: Outcome = "done",
    *,
    project: str | None = None,
    **details: Any,
) -> None:
    """Write an entry. In the transaction of what it tells, it is there exactly if that was done.

    `project` is the project that it is about, if that is not the sender's: its admins see what the operator does there.
    """
    about = {} if project is None else {"project": project}
    values = {**asdict(actor), **about, "action": action, "resource": resource, "outcome": outcome, "details": details}
    clipped = {name: _clipped(name, value) for name, value in values.items()}
    connection.execute(insert(tables.audit).values(id=new_id("audit"), at=database_now(), **clipped))


def list_page(connection: Connection, project: str | None, query: AuditQuery) -> tuple[list[Entry], str | None]:
    """Return a page of the entries of a project, or of all with None, newest first; and the `after` of the next."""
    own = () if project is None else (tables.audit.c.project == project,)
    return read_page(connection, tables.audit, Entry, query, *own, *query.conditions())


def delete_older_than(connection: Connection, age_s: float, limit: int) -> int:
    """Delete at most `limit` entries of this age, the oldest first. Returns how many there were."""
    rows = tables.audit.c
    old = select(rows.id).where(rows.at < database_now() - age_s).order_by(rows.at).limit(limit)
    return len(connection.execute(delete(tables.audit).where(rows.id.in_(old)).returning(rows.id)).all())


def _clipped(name: str, value: Any) -> Any:
    """Return a text as its column holds it: an entry about a hostile request must not fail because of that."""
    if not isinstance(value, str):
        return value
    clean = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in value)
    length = getattr(tables.audit.c[name].type, "length", None)
    return clean[:length]
