"""Give jobs, models and data sets labels, facets to find them by, and what lists show of them; and jobs an index for
each order and filter of their list, and a revision for each change.

What is stored for lists is made by the pure functions of `store/lists.py`, one row at a time.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from store.lists import facets_of, facts_summary_of, figures_of, summary_of

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON(none_as_null=True)
LIST = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
OPEN = "status IN ('queued', 'running')"
ORDERS = ("created_at", "finished_at", "name", "accuracy")
FILTERS = (("status", "method", "kind"), ("kind", "method"), ("method",), ("created_by",), ("created_by_name",))
KINDS = {"jobs": "job_facets", "models": "model_facets", "datasets": "dataset_facets"}
BATCH = 50


def upgrade() -> None:
    for table, facets in KINDS.items():
        op.add_column(table, sa.Column("labels", LIST, nullable=False, server_default=sa.text("'{}'")))
        op.add_column(table, sa.Column("summary", DOCUMENT))
        op.create_table(
            facets,
            sa.Column("project", sa.String(length=100), nullable=False),
            sa.Column("facet", sa.String(length=100), nullable=False),
            sa.Column("value", sa.String(length=300), nullable=False),
            sa.Column("id", sa.String(length=40), nullable=False),
            sa.ForeignKeyConstraint(["id"], [f"{table}.id"], name=f"fk_{facets}_id", ondelete="CASCADE"),
            sa.PrimaryKeyConstraint("project", "facet", "value", "id", name=f"pk_{facets}"),
            sqlite_with_rowid=False,
        )
        op.create_index(f"ix_{facets}_id", facets, ["id"])
    op.add_column("jobs", sa.Column("figures", DOCUMENT))
    op.add_column("jobs", sa.Column("accuracy", sa.Double()))
    op.add_column("jobs", sa.Column("revision", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    if op.get_bind().dialect.name == "postgresql":
        op.execute('ALTER TABLE jobs ALTER COLUMN name TYPE TEXT COLLATE "C"')
    _fill_jobs()
    _fill_registered("models")
    _fill_registered("datasets")
    op.drop_index("ix_jobs_waiting", "jobs")
    _index_waiting("created_at", "id")
    for order in ORDERS:
        op.create_index(f"ix_jobs_{order}", "jobs", ["project", order, "id", "status", "kind", "method"])
    for table in ("models", "datasets"):
        op.create_index(f"ix_{table}_created_at", table, ["project", "created_at", "id", "state"])
    for names in FILTERS:
        op.create_index(f"ix_jobs_{names[0]}", "jobs", ["project", *names, "id"])


def downgrade() -> None:
    for table in ("models", "datasets"):
        op.drop_index(f"ix_{table}_created_at", table)
    for name in (*ORDERS, *(names[0] for names in FILTERS)):
        op.drop_index(f"ix_jobs_{name}", "jobs")
    op.drop_index("ix_jobs_waiting", "jobs")
    _index_waiting("created_at")
    if op.get_bind().dialect.name == "postgresql":
        op.execute('ALTER TABLE jobs ALTER COLUMN name TYPE TEXT COLLATE "default"')
    for name in ("revision", "accuracy", "figures"):
        op.drop_column("jobs", name)
    for table, facets in KINDS.items():
        op.drop_table(facets)
        for name in ("summary", "labels"):
            op.drop_column(table, name)


def _index_waiting(*columns: str) -> None:
    first = sa.text("priority DESC")
    where = {"sqlite_where": sa.text(OPEN), "postgresql_where": sa.text(OPEN)}
    op.create_index("ix_jobs_waiting", "jobs", [first, *columns], **where)


def _fill_jobs() -> None:
    texts = ("id", "project")
    documents = ("spec", "resolved_spec", "result", "summary", "figures")
    rows = _table("jobs", texts, documents, sa.column("accuracy", sa.Double()))
    facets = _table("job_facets", ("project", "facet", "value", "id"), ())
    connection = op.get_bind()
    for row in _each(rows):
        figures = None if row.result is None else figures_of(row.result)
        values: dict[str, Any] = {"summary": summary_of(row.spec, row.resolved_spec), "figures": figures}
        values["accuracy"] = None if figures is None else figures["accuracy"]
        connection.execute(sa.update(rows).where(rows.c.id == row.id).values(**values))
        found = facets_of(row.spec, row.resolved_spec)
        if found:
            connection.execute(
                sa.insert(facets),
                [{"project": row.project, "facet": facet, "value": value, "id": row.id} for facet, value in found],
            )


def _fill_registered(table: str) -> None:
    rows = _table(table, ("id",), ("facts", "summary"))
    for row in _each(rows):
        if row.facts is not None:
            filled = sa.update(rows).where(rows.c.id == row.id).values(summary=facts_summary_of(row.facts))
            op.get_bind().execute(filled)


def _table(name: str, texts: tuple[str, ...], documents: tuple[str, ...], *more: Any) -> Any:
    return sa.table(
        name, *(sa.column(text, sa.Text()) for text in texts), *(sa.column(one, DOCUMENT) for one in documents), *more
    )


def _each(rows: Any) -> Any:
    """Yield all rows in the order of their ids, a few at a time: a row may have megabytes."""
    last = ""
    while (
        batch := op.get_bind().execute(sa.select(rows).where(rows.c.id > last).order_by(rows.c.id).limit(BATCH)).all()
    ):
        yield from batch
        last = batch[-1].id
