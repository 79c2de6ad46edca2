"""Lists: the filters that combine, keyset pages in any order, and what a list finds and shows of a row.

A page is read in two steps: first the ids, from indexes alone, then the rows. How the ids are read depends on how many
rows each filter lets through, which is counted first, up to `RARE`. With none the page is empty. A rare filter gives
its few ids, which are sorted. Else the index of the order is walked, and a page is full after few steps, as matches are
frequent. So the databases' planners need no statistics, and a filter that matches nothing costs one look at an index.

Facets are rows `(facet, value, id)` for what a row is found by that is no column of it: labels, and the names and
digests in the spec of a job.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Select,
    Table,
    Text,
    UnaryExpression,
    and_,
    cast,
    delete,
    false,
    func,
    insert,
    literal,
    or_,
    select,
)
from sqlalchemy.sql.operators import custom_op

from base.references import BLOB, MODEL
from kdcore.spec.baselines import offered_key
from kdcore.spec.measured import ruling

RARE = 300
"""A filter with at most so many matches is read whole, and sorted."""
PAGE_BYTES = 4_000_000
"""The size of stored documents at which a page ends, although more rows were asked for."""
SHOWN_NAMES = 8
"""A summary has so many names of each kind; a spec may have hundreds of teachers."""
VALUE = 300
"""The length to which a facet's value is cut."""


# ── what is stored for lists ──


def summary_of(spec: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a list shows of a job's spec: the names of data and networks, as far as the client gave them."""
    given = spec.get("dataset")
    measured = next((one for field in ("model", "architecture") if isinstance(one := spec.get(field), str)), None)
    return {
        "dataset": _cut(given.get("source") if isinstance(given, Mapping) else given),
        "model": _cut(measured),
        **{
            several: [name for one in _networks(resolved.get(field))[:SHOWN_NAMES] if (name := _cut(_shown(one)))]
            for field, several in (("teacher", "teachers"), ("assistants", "assistants"), ("student", "students"))
        },
    }


def figures_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a list shows of a job's result: a distillation has measured up to three models, others one. Gain and
    gap closed are those of the report's sentence."""
    student = result.get("student") or result.get("measured") or result
    others = {name: (result.get(name) or {}).get("accuracy") for name in ("teacher", "alone")}
    gap, gain, _ = ruling(result.get("proof") or {})
    return {
        "accuracy": student.get("accuracy"),
        "parameters": student.get("parameters"),
        "bytes": student.get("bytes"),
        "gain": result.get("gain") if gain is None else gain["value"],
        "gap_closed": None if gap is None else gap["value"],
        "teacher_accuracy": others["teacher"],
        "alone_accuracy": others["alone"],
        "seconds": result.get("seconds"),
    }


FACTS = (
    *("kind", "labelled", "num_classes", "channels", "image_size", "train", "test", "validation", "test_carved"),
    *("architecture", "parameters", "bytes", "format", "batch", "outputs"),
)
"""The facts of models and data sets that lists show. Others name each class."""


def facts_summary_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a list shows of the facts of a model or a data set."""
    return {name: facts[name] for name in FACTS if name in facts}


def facets_of(spec: Mapping[str, Any], resolved: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Return the facets of a job's specs: `dataset`, `teacher`, `student` and `model` with each of their names, and
    the digests of their bytes; `job`, the id of the job whose student it takes; `benchmark`, the key of its figures;
    and `baseline`, the key of a student alone that the job trains."""
    found = {("job", resolved["job"])} if isinstance(resolved.get("job"), str) else set()
    if resolved.get("kind") == "benchmark":
        found.add(("benchmark", resolved["key"]))
    if resolved.get("training") and resolved.get("student") and (key := offered_key(resolved)) is not None:
        found.add((BASELINE, key))
    for given in (spec, resolved):
        for facet in ("dataset", "unlabelled", "teacher", "student", "model"):
            for one in _networks(given.get(facet)):
                name = "dataset" if facet == "unlabelled" else facet
                found |= {(name, facet_value(value)) for value in _names(one)}
    return found


BASELINE = "baseline"
"""The facet of a job by which another one finds its own student alone."""


def put_facets(connection: Connection, table: Table, row: Any, found: Iterable[tuple[str, str]]) -> None:
    """Replace the facets of a row, which has `project`, `id` and `labels`."""
    connection.execute(delete(table).where(table.c.id == row.id))
    labels = {(_label(name), facet_value(value)) for name, value in row.labels.items()}
    rows = [
        {"project": row.project, "facet": facet, "value": value, "id": row.id}
        for facet, value in sorted(labels | set(found))
    ]
    if rows:
        connection.execute(insert(table), rows)


def facet_value(name: str) -> str:
    """Return a name as facets have it: without the prefixes that say only what kind of name it is."""
    return name.removeprefix(MODEL).removeprefix(BLOB.removesuffix("sha256:"))[:VALUE]


def _label(name: str) -> str:
    return f"label.{name}"


def _networks(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]


def _names(one: Any) -> Iterator[str]:
    if isinstance(one, str):
        yield one
    elif isinstance(one, Mapping):
        fields = ("source", "checkpoint", "program", "logits", "architecture")
        yield from (one[field] for field in fields if isinstance(one.get(field), str))


def _shown(one: Any) -> Any:
    if isinstance(one, str):
        return one
    kinds = {kind: kind for kind in ("program", "logits") if one.get(kind)}
    return one.get("architecture") or one.get("checkpoint") or next(iter(kinds), None)


def _cut(name: Any) -> str | None:
    return name[:VALUE] if isinstance(name, str) else None


# ── filters ──


@dataclass(frozen=True)
class Filter:
    """A condition of a list, in three forms."""

    condition: ColumnElement[bool]
    """Of a row."""
    checked: ColumnElement[bool]
    """The same, for SQLite, which takes no index for it."""
    ids: Select[Any]
    """The ids of all rows that it is true of, from an index."""
    of_column: bool = False


@dataclass(frozen=True)
class Rows:
    """The rows of a project in a table, with the table of their facets."""

    table: Table
    facets: Table
    project: str

    def where(self, name: str, condition: Callable[[ColumnElement[Any]], ColumnElement[bool]]) -> Filter:
        """Return the filter of a condition on a column that has an index."""
        column = self.table.c[name]
        unindexed: ColumnElement[Any] = UnaryExpression(column, operator=custom_op("+"), type_=column.type)
        ids = select(self.table.c.id).where(self.own, condition(column))
        return Filter(condition(column), condition(unindexed), ids, of_column=True)

    def with_facet(self, facet: str, value: str | None) -> Filter:
        """Return the filter of a facet; with None, of any value."""
        rows = self.facets.c
        is_it = and_(rows.project == self.project, rows.facet == facet)
        if value is not None:
            is_it = and_(is_it, rows.value == facet_value(value))
        found = select(literal(1)).where(is_it, rows.id == self.table.c.id).correlate(self.table)
        # With an OFFSET, PostgreSQL looks each row up. It would make a join, and read all rows of a frequent value: a
        # prepared statement's plan is made for the average value.
        return Filter(found.offset(0).exists(), found.exists(), select(rows.id).where(is_it))

    def with_labels(self, labels: Sequence[str]) -> Iterator[Filter]:
        """Yield the filters of labels, each `name:value`, or `name` alone, of any value."""
        values: dict[str, set[str]] = {}
        for label in labels:
            name, colon, value = label.partition(":")
            values.setdefault(name, set()).update({value} if colon else ())
        for name, given in values.items():
            # No row has two values of one label; to look for both would go through all rows of each.
            yield self.nothing if len(given) > 1 else self.with_facet(_label(name), next(iter(given), None))

    @property
    def nothing(self) -> Filter:
        return Filter(false(), false(), select(self.table.c.id).where(false()))

    def starting(self, name: str, prefix: str) -> Filter:
        """Return the filter of a column's values that begin with this."""
        return self.where(name, lambda column: and_(column >= prefix, column < prefix + chr(0x10FFFF)))

    @property
    def own(self) -> ColumnElement[bool]:
        return self.table.c.project == self.project


# ── pages ──


class BadCursor(ValueError):
    """An `after` that no page of this order has given."""


@dataclass(frozen=True)
class Order:
    """The order of a list: by a column, then by id. Rows without a value come last, in both directions."""

    column: str
    descending: bool

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the order of `created_at`, or descending of `-created_at`."""
        return cls(name.removeprefix("-"), name.startswith("-"))

    def __str__(self) -> str:
        return "-" * self.descending + self.column

    def cursor(self, value: Any, id: str) -> str:
        """Return the `after` of the page that follows a row."""
        text = json.dumps([str(self), value, id], ensure_ascii=False, separators=(",", ":"))
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    def position(self, cursor: str) -> tuple[Any, str]:
        """Return value and id of the row that a cursor names. Raises BadCursor."""
        try:
            padded = cursor + "=" * (-len(cursor) % 4)
            order, value, id = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        except (ValueError, TypeError, binascii.Error):
            raise BadCursor("is no `next` of a page") from None
        if isinstance(order, str) and order != str(self):
            raise BadCursor(f"is of a list with sort={order[:20]}; begin again without it, or keep that order")
        kind = str if self.column == "name" else (int, float)
        is_value = value is None or (isinstance(value, kind) and not isinstance(value, bool))
        if not isinstance(order, str) or not isinstance(id, str) or not is_value:
            raise BadCursor("is no `next` of a page")
        return value, id


NEWEST_FIRST = Order("created_at", descending=True)


def page_of_ids(
    connection: Connection, rows: Rows, filters: Sequence[Filter], order: Order, after: str | None, limit: int
) -> tuple[list[str], str | None]:
    """Return the ids of a page in this order, and the `after` of the next page, None at the end."""
    column, id = rows.table.c[order.column], rows.table.c.id
    matching = select(id, column)
    of_columns = [one for one in filters if one.of_column]
    if len(of_columns) > 1:
        # Few rows may match all of these, although each is common: there are indexes of several columns.
        condition, checked = (and_(*(getattr(one, form) for one in of_columns)) for form in ("condition", "checked"))
        both = Filter(condition, checked, select(id).where(rows.own, condition))
        filters = [both, *(one for one in filters if not one.of_column)]
    counts = _counts(connection, filters, RARE + 1)
    least = min(counts, default=RARE + 1)
    if least == 0:
        return [], None
    if least <= RARE:
        rarest = counts.index(least)
        few = filters[rarest].ids.limit(RARE).subquery("few")
        others = (one.condition for place, one in enumerate(filters) if place != rarest)
        matching = matching.join(few, few.c.id == id).where(*others)
    else:
        # SQLite would take the index of a condition, and then sort all that it finds there.
        on_sqlite = connection.dialect.name == "sqlite"
        matching = matching.where(rows.own, *(one.checked if on_sqlite else one.condition for one in filters))
    found: list[Any] = []
    for part in _parts(column, id, order, None if after is None else order.position(after)):
        if len(found) <= limit:
            found += connection.execute(part(matching).limit(limit + 1 - len(found))).all()
    page = [row[0] for row in found[:limit]]
    return page, order.cursor(found[limit - 1][1], page[-1]) if len(found) > limit else None


def may_match(connection: Connection, filters: Sequence[Filter]) -> bool:
    """Return False if one of the filters lets no row through, which is known at once."""
    return min(_counts(connection, filters, 1), default=1) > 0


def _counts(connection: Connection, filters: Sequence[Filter], most: int) -> list[int]:
    """Return how many rows each filter lets through, and no more than `most`."""
    if not filters:
        return []
    counts = [select(func.count()).select_from(one.ids.limit(most).subquery()).scalar_subquery() for one in filters]
    return list(connection.execute(select(*counts)).one())


def _parts(column: Column[Any], id: Column[Any], order: Order, at: tuple[Any, str] | None) -> Iterator[Any]:
    """Yield the parts of a list one after the other: the rows that have a value, then those that have none. Each is a
    range of the index."""

    def ordered(query: Select[Any], *keys: Column[Any]) -> Select[Any]:
        return query.order_by(*(key.desc() if order.descending else key.asc() for key in keys))

    def beyond(key: Column[Any], value: Any) -> ColumnElement[bool]:
        found: ColumnElement[bool] = key < value if order.descending else key > value
        return found

    if at is None or at[0] is not None:
        further: tuple[ColumnElement[bool], ...] = ()
        if at is not None:
            value, last = at
            # The first condition, which the second implies, bounds the range of the index.
            up_to = column <= value if order.descending else column >= value
            further = (up_to, or_(beyond(column, value), and_(column == value, beyond(id, last))))
        yield lambda query: ordered(query.where(column.is_not(None), *further), column, id)
    if column.nullable:
        rest = () if at is None or at[0] is not None else (beyond(id, at[1]),)
        yield lambda query: ordered(query.where(column.is_(None), *rest), id)


def within_bytes(
    connection: Connection, table: Table, documents: Sequence[Column[Any]], ids: Sequence[str]
) -> list[str]:
    """Return the first of these ids, at least one, whose documents have at most `PAGE_BYTES` together."""
    sizes = sum((func.coalesce(func.length(cast(one, Text)), 0) for one in documents), literal(0))
    by_id = {id: size for id, size in connection.execute(select(table.c.id, sizes).where(table.c.id.in_(ids)))}
    total = 0
    fitting: list[str] = []
    for id in ids:
        total += by_id.get(id, 0)
        if total > PAGE_BYTES and fitting:
            break
        fitting.append(id)
    return fitting
