"""Add warnings to jobs and registrations, the check of a job's teacher, jobs of another kind, jobs that wait for their
teacher, and what was measured once for later jobs.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

WARNED = ("jobs", "models", "datasets")
LIST = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    for table in WARNED:
        op.add_column(table, sa.Column("warnings", LIST, nullable=False, server_default=sa.text("'[]'")))
    kind = sa.Column("kind", sa.String(length=16), nullable=False, server_default=sa.text("'distillation'"))
    op.add_column("jobs", kind)
    op.add_column("jobs", sa.Column("teacher_check", sa.JSON(none_as_null=True)))
    op.create_table(
        "job_teachers",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("teacher_job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_teachers_job_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "teacher_job_id", name="pk_job_teachers"),
    )
    op.create_index("ix_job_teachers_teacher_job_id", "job_teachers", ["teacher_job_id"])
    op.create_table(
        "measurements",
        sa.Column("project", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("figures", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("measured_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("project", "kind", "key", name="pk_measurements"),
    )


def downgrade() -> None:
    op.drop_table("measurements")
    op.drop_table("job_teachers")
    op.drop_column("jobs", "teacher_check")
    op.drop_column("jobs", "kind")
    for table in WARNED:
        op.drop_column(table, "warnings")
