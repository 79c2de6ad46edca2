"""Plain names: `requested`, `attempts_without_progress`, and in the stored events `takeover` and `attempt`."""

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COLUMNS = (
    ("jobs", "wish", "requested"),
    ("jobs", "attempts", "attempts_without_progress"),
    ("job_attempts", "attempt", "attempts_without_progress"),
)
CONSTRAINTS = (
    ("ck_jobs_wish", "ck_jobs_requested"),
    ("ck_jobs_only_the_running_are_asked", "ck_jobs_only_running_jobs_are_requested"),
)
EVENTS = sa.table(
    "job_events",
    sa.column("job_id", sa.String),
    sa.column("seq", sa.BigInteger),
    sa.column("type", sa.String),
    sa.column("data", sa.JSON(none_as_null=True)),
)


def upgrade() -> None:
    for table, old, new in COLUMNS:
        _rename_column(table, old, new)
    for old, new in CONSTRAINTS:
        _rename_constraint(old, new)
    _rewrite_claims(_to_plain)
    # A worker writes its row anew with each heartbeat.
    op.execute("DELETE FROM workers")


def downgrade() -> None:
    _rewrite_claims(_from_plain)
    for old, new in CONSTRAINTS:
        _rename_constraint(new, old)
    for table, old, new in COLUMNS:
        _rename_column(table, new, old)


def _rename_column(table: str, old: str, new: str) -> None:
    # Not Alembic's batch mode: it copies the table and drops the old one, and a job's rows would be deleted with it.
    op.execute(f"ALTER TABLE {table} RENAME COLUMN {old} TO {new}")


def _rename_constraint(old: str, new: str) -> None:
    connection = op.get_bind()
    if connection.dialect.name == "postgresql":
        op.execute(f"ALTER TABLE jobs RENAME CONSTRAINT {old} TO {new}")
        return
    # SQLite's documented way for a change that leaves the stored rows as they are (lang_altertable.html, section 7).
    version = connection.execute(sa.text("PRAGMA schema_version")).scalar_one()
    op.execute("PRAGMA writable_schema = ON")
    connection.execute(
        sa.text("UPDATE sqlite_schema SET sql = replace(sql, :old, :new) WHERE type = 'table' AND name = 'jobs'"),
        {"old": old, "new": new},
    )
    op.execute(f"PRAGMA schema_version = {version + 1}")
    op.execute("PRAGMA writable_schema = OFF")


def _to_plain(data: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in data.items() if name not in ("fence", "rescued")}
    return {**rest, "attempt": data["fence"], "takeover": data["rescued"]}


def _from_plain(data: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in data.items() if name != "takeover"}
    return {**rest, "fence": data["attempt"], "rescued": data["takeover"]}


def _rewrite_claims(rewritten: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    connection = op.get_bind()
    claims = connection.execute(
        sa.select(EVENTS.c.job_id, EVENTS.c.seq, EVENTS.c.data).where(EVENTS.c.type == "claimed")
    ).all()
    for claim in claims:
        row = sa.and_(EVENTS.c.job_id == claim.job_id, EVENTS.c.seq == claim.seq)
        connection.execute(sa.update(EVENTS).where(row).values(data=rewritten(claim.data)))
