"""Make the audit log and the table of idempotency keys, which takes over those of jobs; and indexes for limits.

The digest of a key is now that of the body's meaning, so it is made again from the body.
"""

import hashlib
import math
from typing import Any

import sqlalchemy as sa
from alembic import op
from pydantic_core import from_json, to_json

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency",
        sa.Column("project", sa.String(length=100), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("resource", sa.String(length=100), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("project", "key", name=op.f("pk_idempotency")),
    )
    op.create_index("ix_idempotency_kind_resource", "idempotency", ["kind", "resource"])
    op.create_table(
        "audit",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("project", sa.String(length=100)),
        sa.Column("key_id", sa.String(length=40)),
        sa.Column("key_name", sa.String(length=100)),
        sa.Column("role", sa.String(length=16)),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("resource", sa.String(length=200)),
        sa.Column("address", sa.String(length=64)),
        sa.Column("request_id", sa.String(length=80)),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("details", sa.JSON(none_as_null=True), nullable=False),
        sa.CheckConstraint("outcome IN ('done', 'refused')", name=op.f("ck_audit_outcome")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index("ix_audit_project_id", "audit", ["project", "id"])
    op.create_index("ix_audit_project_action_id", "audit", ["project", "action", "id"])
    op.create_index("ix_audit_project_resource_id", "audit", ["project", "resource", "id"])
    op.create_index("ix_audit_at", "audit", ["at"])
    op.create_index("ix_jobs_project_status_id", "jobs", ["project", "status", "id"])
    op.create_index("ix_uploads_project_id", "uploads", ["project", "id"])
    _take_over_keys(op.get_bind())


def downgrade() -> None:
    op.drop_index("ix_uploads_project_id", "uploads")
    op.drop_index("ix_jobs_project_status_id", "jobs")
    op.drop_table("audit")
    op.drop_table("idempotency")


def _take_over_keys(connection: sa.Connection) -> None:
    page = sa.text(
        "SELECT id, project, idempotency_key, CAST(spec AS TEXT) AS spec, created_at FROM jobs "
        "WHERE idempotency_key IS NOT NULL AND id > :after ORDER BY id LIMIT 500"
    )
    add = sa.text(
        "INSERT INTO idempotency (project, key, kind, resource, digest, created_at) "
        "VALUES (:project, :key, 'jobs', :resource, :digest, :created_at)"
    )
    after = ""
    while rows := connection.execute(page, {"after": after}).all():
        taken = [
            {
                "project": row.project,
                "key": row.idempotency_key,
                "resource": row.id,
                "digest": hashlib.sha256(to_json(["jobs", _canonical(from_json(row.spec))])).hexdigest(),
                "created_at": row.created_at,
            }
            for row in rows
        ]
        connection.execute(add, taken)
        after = rows[-1].id


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _canonical(value[name]) for name in sorted(value)}
    if isinstance(value, list):
        return [_canonical(one) for one in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    return value
