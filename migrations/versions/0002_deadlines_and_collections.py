"""Add the time limit of a job, which a retry gets again; the last batch of writes of an attempt; and what
each collection removed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("deadline_s", sa.Double()))
    op.add_column("job_attempts", sa.Column("batch", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.create_table(
        "collections",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("began_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double()),
        sa.Column("removed", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_collections"),
    )


def downgrade() -> None:
    op.drop_table("collections")
    op.drop_column("job_attempts", "batch")
    op.drop_column("jobs", "deadline_s")
