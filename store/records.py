"""Rows as frozen records, and helpers for all tables: ids, the database's time, INSERT … ON CONFLICT.

A record's fields are named after the table's columns. A new field of a job is one line in `NewJob` (or in `Job`), one
in `tables.jobs`, a migration, and one line in `base.wire.JobView` if clients read it. It is filled from a field of the
same name in the spec or its scheduling.
"""

import re
import secrets
import threading
import time
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar

from pydantic import AwareDatetime, BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from sqlalchemy import Column, ColumnElement, Connection, Double, Row, Table, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement

from base.text import Text
from store import tables
from store.lists import NEWEST_FIRST, BadCursor, Order, summary_of

if TYPE_CHECKING:
    from kdcore.spec import JobSpec, KindSpec

T = TypeVar("T")


@dataclass(frozen=True)
class NewJob:
    """A job as the client sends it, together with its resolved spec."""

    project: str
    name: str | None
    kind: str
    """`base.jobs.Kind`."""
    method: str
    spec: dict[str, Any]
    """The spec as the client sent it."""
    resolved_spec: dict[str, Any]
    spec_sha256: str
    """Digest of the body: the same idempotency key with another digest is a conflict."""
    idempotency_key: str | None
    created_by: str | None
    """The id of the key that sent it; None if no row has the key: the operator's, or none at all."""
    created_by_name: str | None
    """The name of that key, as it was then."""
    priority: int
    max_attempts: int
    deadline_s: float | None
    warnings: list[dict[str, Any]]
    """What is doubtful about the job (`base/warning.py`); its attempts add to it."""
    labels: dict[str, str]
    """Names and values to find it by."""
    summary: dict[str, Any]
    """What a list shows of its spec: `store.lists.summary_of`."""

    @classmethod
    def of(cls, resolved: "JobSpec | KindSpec", **sent: Any) -> "NewJob":
        """Make a job of a resolved spec. Each field comes from `sent`, or from the field of that name in the spec.

        A job of another kind has None for a field that only the spec of a distillation has.
        """
        spec = resolved.as_json()
        named = {"method": resolved.method_name, "resolved_spec": spec, "summary": summary_of(sent["spec"], spec)}
        values = {"kind": "distillation", **vars(resolved), **vars(resolved.scheduling), **named, **sent}
        if values["kind"] != "distillation":
            values = {**dict.fromkeys(field.name for field in fields(cls)), **values}
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Job(NewJob):
    """One row of `jobs`."""

    id: str
    status: str
    phase: str | None
    requested: str | None
    """The client's request to a running job: `cancel` or `pause`."""
    fence: int
    """The fencing token. It increases with every claim, and when a job is ended from outside; writes with an older
    number are refused."""
    owner: str | None
    lease_until: float | None
    attempts_without_progress: int
    """Claims since the job's last progress."""
    checkpoint_step: int | None
    progress: dict[str, Any] | None
    teacher_check: dict[str, Any] | None
    """The teacher's accuracy on test images, measured before the training."""
    result: dict[str, Any] | None
    """The report of a succeeded job."""
    error: dict[str, Any] | None
    event_seq: int
    """The number of the job's last event."""
    created_at: float
    started_at: float | None
    finished_at: float | None
    not_before: float | None
    deadline_at: float | None
    figures: dict[str, Any] | None
    """What a list shows of its result: `store.lists.figures_of`."""
    revision: int
    """Increases with every change of the row."""


@dataclass(frozen=True)
class ListedJob:
    """The columns of a job that a list shows. All are small, whatever the client sent."""

    id: str
    name: str | None
    kind: str
    method: str
    labels: dict[str, str]
    summary: dict[str, Any] | None
    figures: dict[str, Any] | None
    created_by: str | None
    created_by_name: str | None
    status: str
    phase: str | None
    requested: str | None
    priority: int
    progress: dict[str, Any] | None
    attempts_without_progress: int
    max_attempts: int
    checkpoint_step: int | None
    error: dict[str, Any] | None
    warnings: list[dict[str, Any]]
    created_at: float
    started_at: float | None
    finished_at: float | None
    not_before: float | None
    deadline_at: float | None


def columns(table: Table, record: type[Any]) -> list[Column[Any]]:
    """Return the columns of the record's fields, in the order of the fields."""
    return [table.c[field.name] for field in fields(record)]


def as_record(record: type[T], row: Row[*tuple[Any, ...]]) -> T:
    """Make a record from a row of exactly these columns."""
    return record(*row)


JOB_COLUMNS = columns(tables.jobs, Job)


_MOMENT = (
    r"^[1-9][0-9]{3}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"T([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,6})?)?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)


def _as_moment(text: Any) -> datetime:
    """Return a time that was sent as text. Other forms, such as plain seconds, could be taken for another time."""
    if not isinstance(text, str) or re.search(_MOMENT, text) is None:
        raise ValueError("a time as ISO 8601 with an offset belongs here, such as 2026-11-29T18:30:00Z")
    return datetime.fromisoformat(text)


Moment = Annotated[
    AwareDatetime,
    BeforeValidator(_as_moment),
    # Not the format date-time, which has seconds: those may be left out.
    WithJsonSchema({"type": "string", "pattern": _MOMENT, "maxLength": 40}),
]
"""A time in a parameter."""


class PageQuery(BaseModel):
    """A page of a list, as query parameters."""

    limit: int = Field(default=20, ge=1, le=100)
    after: Annotated[str, Text(2000)] | None = Field(default=None, description="`next` of the page before.")


class NewestQuery(PageQuery):
    """A page of a list with cursors."""

    @model_validator(mode="after")
    def _follows_a_page_of_this_order(self) -> Self:
        if self.after is not None:
            try:
                self.order.position(self.after)
            except BadCursor as fault:
                context = {"fault": str(fault), "parameter": "after"}
                raise PydanticCustomError("cursor", "`after` {fault}", context) from None
        return self

    @property
    def order(self) -> Order:
        return NEWEST_FIRST


class LabelledQuery(NewestQuery):
    """A page of what has labels."""

    labels: list[Annotated[str, Text(300)]] = Field(
        default=[], max_length=16, description="`name:value`, or a `name` with any value; several must all match."
    )


def read_page(
    connection: Connection, table: Table, record: type[T], query: PageQuery, *conditions: ColumnElement[bool]
) -> tuple[list[T], str | None]:
    """Return a page of records, newest first, and the `after` of the next page, None at the end."""
    matching = select(*columns(table, record)).where(*conditions)
    if query.after is not None:
        matching = matching.where(table.c.id < query.after)
    rows = connection.execute(matching.order_by(table.c.id.desc()).limit(query.limit + 1)).all()
    page = [as_record(record, row) for row in rows[: query.limit]]
    return page, rows[query.limit - 1].id if len(rows) > query.limit else None


DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32: in ASCII order, and without letters that can be confused with digits."""


_newest_id = 0
_newest_id_lock = threading.Lock()


def new_id(prefix: str) -> str:
    """Return an id such as `job_01k3m0v2xw8r…`: 10 digits of time in ms, 14 random ones (70 bits).

    Ids sort by age; pages of a list are ordered by them. Those that one process makes in the same millisecond do, too.
    """
    global _newest_id  # noqa: PLW0603 - the order of a whole process
    with _newest_id_lock:
        drawn = (time.time_ns() // 1_000_000 << 70) + secrets.randbits(70)
        _newest_id = drawn if drawn > _newest_id else _newest_id + 1 + secrets.randbits(60)
        return f"{prefix}_{_base32(_newest_id, 24)}"


def _base32(number: int, width: int) -> str:
    return "".join(DIGITS[(number >> 5 * place) & 31] for place in reversed(range(width)))


class database_now(FunctionElement[float]):
    """The database's time at this moment (not at the start of the transaction), in seconds since 1970.

    Leases are measured by this clock only: the clock of a worker's host may be hours off.
    """

    type = Double()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _now_on_postgres(element: database_now, compiler: Any, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(database_now, "sqlite")
def _now_on_sqlite(element: database_now, compiler: Any, **options: Any) -> str:
    # Before SQLite 3.42 unixepoch('subsec') is NULL without an error, and a lease would never expire.
    return "((julianday('now') - 2440587.5) * 86400.0)"


def upsert(connection: Connection, table: Table) -> Any:
    """Return an INSERT with `on_conflict_do_nothing` and `on_conflict_do_update`, in the connection's dialect."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)
