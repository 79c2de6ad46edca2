"""Give registrations a state, with a lease for the server that inspects the file; and data sets their thumbnails.

Rows of earlier versions were inspected before they were made: they are ready.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLES = ("models", "datasets")
NEW = ("state", "request", "owner", "lease_until", "attempts", "progress", "error")
STATES = "state IN ('inspecting', 'ready', 'refused')"
LEASE = "(state = 'inspecting') = (lease_until IS NOT NULL)"


def upgrade() -> None:
    for table in TABLES:
        # On SQLite this makes the table anew. No other table refers to these.
        with op.batch_alter_table(table) as batch:
            state = sa.Column("state", sa.String(length=16), nullable=False, server_default=sa.text("'ready'"))
            batch.add_column(state)
            batch.add_column(sa.Column("request", sa.JSON(none_as_null=True)))
            batch.add_column(sa.Column("owner", sa.Text()))
            batch.add_column(sa.Column("lease_until", sa.Double()))
            batch.add_column(sa.Column("attempts", sa.Integer(), nullable=False, server_default=sa.text("0")))
            batch.add_column(sa.Column("progress", sa.JSON(none_as_null=True)))
            batch.add_column(sa.Column("error", sa.JSON(none_as_null=True)))
            batch.alter_column("facts", existing_type=sa.JSON(none_as_null=True), nullable=True)
            batch.create_check_constraint(op.f(f"ck_{table}_state"), STATES)
            batch.create_check_constraint(op.f(f"ck_{table}_inspecting_holds_a_lease"), LEASE)
    op.add_column("datasets", sa.Column("thumbnails", sa.JSON(none_as_null=True)))


def downgrade() -> None:
    op.drop_column("datasets", "thumbnails")
    for table in TABLES:
        op.execute(f"DELETE FROM {table} WHERE state <> 'ready'")  # noqa: S608
        with op.batch_alter_table(table) as batch:
            batch.drop_constraint(op.f(f"ck_{table}_state"), type_="check")
            batch.drop_constraint(op.f(f"ck_{table}_inspecting_holds_a_lease"), type_="check")
            batch.alter_column("facts", existing_type=sa.JSON(none_as_null=True), nullable=False)
            for name in NEW:
                batch.drop_column(name)
