"""Make projects, their keys and their blobs, and give jobs their sender.

A digest names a blob in the projects that have it only. A project has what its rows name by now: what it uploaded, what
its jobs made or read, what it registered.
"""

import re
import time
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
BATCH = 500


def upgrade() -> None:
    op.create_table(
        "projects",
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("deleted_at", sa.Double()),
        sa.Column("limits", sa.JSON(none_as_null=True)),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_projects")),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("project", sa.String(length=100), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("created_by", sa.String(length=100)),
        sa.Column("expires_at", sa.Double()),
        sa.Column("revoked_at", sa.Double()),
        sa.Column("last_used_at", sa.Double()),
        sa.CheckConstraint("role IN ('operator', 'admin', 'member', 'reader')", name=op.f("ck_keys_role")),
        sa.ForeignKeyConstraint(
            ["project"], ["projects.name"], name=op.f("fk_keys_project_projects"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("prefix", name=op.f("uq_keys_prefix")),
    )
    op.create_index("ix_keys_project_id", "keys", ["project", "id"])
    op.create_table(
        "project_blobs",
        sa.Column("project", sa.String(length=100), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("project", "sha256", name=op.f("pk_project_blobs")),
    )
    op.add_column("jobs", sa.Column("created_by", sa.String(length=40)))
    op.add_column("jobs", sa.Column("created_by_name", sa.String(length=100)))
    _fill(op.get_bind())


def downgrade() -> None:
    op.drop_column("jobs", "created_by_name")
    op.drop_column("jobs", "created_by")
    op.drop_table("project_blobs")
    op.drop_index("ix_keys_project_id", "keys")
    op.drop_table("keys")
    op.drop_table("projects")


def _fill(connection: sa.Connection) -> None:
    now = time.time()
    tables = ("jobs", "uploads", "models", "datasets", "measurements")
    rows_of = " UNION ".join(f"SELECT project FROM {table}" for table in tables)  # noqa: S608
    names = {"default", *connection.scalars(sa.text(rows_of))}
    add = sa.text("INSERT INTO projects (name, created_at) VALUES (:name, :now)")
    connection.execute(add, [{"name": name, "now": now} for name in sorted(names)])

    found: set[tuple[str, str]] = set()
    for query in (
        "SELECT project, sha256 FROM uploads WHERE status = 'complete'",
        "SELECT project, sha256 FROM models",
        "SELECT project, sha256 FROM datasets",
        "SELECT jobs.project, artifacts.sha256 FROM artifacts JOIN jobs ON jobs.id = artifacts.job_id",
    ):
        found.update((row.project, row.sha256) for row in connection.execute(sa.text(query)))
    documents = (
        "SELECT project, id, CAST(resolved_spec AS TEXT) AS document FROM jobs WHERE id > :after",
        "SELECT project, id, CAST(thumbnails AS TEXT) AS document FROM datasets WHERE id > :after",
    )
    for query in documents:
        found.update(_named(connection, query))
    rows = [{"project": project, "sha256": sha256, "now": now} for project, sha256 in sorted(found)]
    added = sa.text("INSERT INTO project_blobs (project, sha256, seen_at) VALUES (:project, :sha256, :now)")
    for start in range(0, len(rows), BATCH):
        connection.execute(added, rows[start : start + BATCH])


def _named(connection: sa.Connection, query: str) -> set[tuple[str, str]]:
    """Return the digests that JSON documents name, with the rows' projects. Reads so many rows at a time."""
    page = sa.text(f"{query} ORDER BY id LIMIT {BATCH}")
    found: set[tuple[str, str]] = set()
    after: Any = ""
    while rows := connection.execute(page, {"after": after}).all():
        for row in rows:
            found.update((row.project, digest) for digest in DIGEST.findall(row.document or ""))
        after = rows[-1].id
    return found
