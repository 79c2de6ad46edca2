"""The tables. Times are seconds since 1970 by the database's clock; sizes are bytes; digests are hexadecimal."""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.dialects import postgresql

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

DOCUMENT = JSON(none_as_null=True)
# PostgreSQL compares only jsonb, so a default, which Alembic compares, needs it.
LIST = JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
SHA256 = String(64)
ID = String(40)
# Sorted by code points on both databases, so that a prefix is a range of the index.
NAME = Text().with_variant(Text(collation="C"), "postgresql")


def _job_id() -> Column[str]:
    return Column("job_id", ID, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


# A project separates everything that its keys can see. The name is the `project` of the other tables' rows.
projects = Table(
    "projects",
    metadata,
    Column("name", String(100), primary_key=True),
    Column("created_at", Double, nullable=False),
    # The row of a deleted project stays, so that no other project gets its name, and with it what may still have it.
    Column("deleted_at", Double),
    # Null, or in the place of the settings' limits those of this project.
    Column("limits", DOCUMENT),
)

keys = Table(
    "keys",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project", String(100), ForeignKey("projects.name", ondelete="CASCADE"), nullable=False),
    Column("name", String(100), nullable=False),
    Column("role", String(16), nullable=False),
    # The part of the key that finds its row, and the digest of the whole key; the key itself is nowhere.
    Column("prefix", String(16), nullable=False),
    Column("sha256", SHA256, nullable=False),
    Column("created_at", Double, nullable=False),
    # The name of the key that made it; null if no key was needed.
    Column("created_by", String(100)),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("last_used_at", Double),
    UniqueConstraint("prefix"),
    CheckConstraint("role IN ('operator', 'admin', 'member', 'reader')", name="role"),
)
Index("ix_keys_project_id", keys.c.project, keys.c.id)

# The blobs that a project has: a digest names a blob in these projects only. `seen_at` is when it last got it.
project_blobs = Table(
    "project_blobs",
    metadata,
    Column("project", String(100), primary_key=True),
    Column("sha256", SHA256, primary_key=True),
    Column("seen_at", Double, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project", String(100), nullable=False),
    Column("name", NAME),
    # What the job makes: a student (`distillation`), or the accuracy of a registered model (`evaluation`).
    Column("kind", String(16), nullable=False, server_default=text("'distillation'")),
    Column("method", Text, nullable=False),
    Column("spec", DOCUMENT, nullable=False),
    Column("resolved_spec", DOCUMENT, nullable=False),
    Column("spec_sha256", SHA256, nullable=False),
    Column("idempotency_key", String(200)),
    # The id and the name of the sender's key; both null in rows of earlier versions, the id where no row has the key.
    Column("created_by", ID),
    Column("created_by_name", String(100)),
    Column("status", String(16), nullable=False),
    Column("phase", String(32)),
    Column("requested", String(16)),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    # The fencing token. Only writes with the newest number are accepted.
    Column("fence", BigInteger, nullable=False, server_default=text("0")),
    Column("owner", Text),
    Column("lease_until", Double),
    Column("attempts_without_progress", Integer, nullable=False, server_default=text("0")),
    Column("max_attempts", Integer, nullable=False),
    Column("checkpoint_step", BigInteger),
    # `checkpoint_step` at the last claim: a later checkpoint is progress.
    Column("claimed_step", BigInteger),
    Column("not_before", Double),
    # The time that the job may take from its submission or last retry; and the end of that time.
    Column("deadline_s", Double),
    Column("deadline_at", Double),
    Column("event_seq", BigInteger, nullable=False, server_default=text("0")),
    Column("progress", DOCUMENT),
    # When an attempt began or its progress last grew: an alert may ask for it.
    Column("progressed_at", Double),
    Column("warnings", LIST, nullable=False, server_default=text("'[]'")),
    Column("teacher_check", DOCUMENT),
    Column("result", DOCUMENT),
    Column("error", DOCUMENT),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("labels", LIST, nullable=False, server_default=text("'{}'")),
    # What a list shows of the spec, and of the result: these are small, whatever the client sent.
    Column("summary", DOCUMENT),
    Column("figures", DOCUMENT),
    Column("accuracy", Double),
    # Increases with every UPDATE of the row: what was made of it is valid while this is the same.
    Column(
        "revision",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        onupdate=literal_column("revision") + literal_column("1"),
    ),
    UniqueConstraint("project", "idempotency_key"),
    CheckConstraint("status IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')", name="status"),
    CheckConstraint("requested IN ('cancel', 'pause')", name="requested"),
    CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="running_holds_a_lease"),
    CheckConstraint("requested IS NULL OR status = 'running'", name="only_running_jobs_are_requested"),
)
Index("ix_jobs_project_id", jobs.c.project, jobs.c.id)
Index("ix_jobs_project_status_id", jobs.c.project, jobs.c.status, jobs.c.id)
Index(
    "ix_jobs_waiting",
    jobs.c.priority.desc(),
    jobs.c.created_at,
    jobs.c.id,
    sqlite_where=jobs.c.status.in_(("queued", "running")),
    postgresql_where=jobs.c.status.in_(("queued", "running")),
)

# A list walks the index of its order; behind the order stand the columns that many jobs are filtered by, so that SQLite
# need not look at the rows.
for _order in ("created_at", "finished_at", "name", "accuracy"):
    _columns = (jobs.c.project, jobs.c[_order], jobs.c.id, jobs.c.status, jobs.c.kind, jobs.c.method)
    Index(f"ix_jobs_{_order}", *_columns)
for _filters in (("status", "method", "kind"), ("kind", "method"), ("method",), ("created_by",), ("created_by_name",)):
    Index(f"ix_jobs_{_filters[0]}", jobs.c.project, *(jobs.c[_filter] for _filter in _filters), jobs.c.id)


def _facets(of: Table) -> Table:
    """Return the table of what the rows of another one are found by: labels, and the names and digests in a spec."""
    name = f"{of.name.removesuffix('s')}_facets"
    facets = Table(
        name,
        metadata,
        Column("project", String(100), primary_key=True),
        Column("facet", String(100), primary_key=True),
        Column("value", String(300), primary_key=True),
        Column("id", ID, ForeignKey(f"{of.name}.id", ondelete="CASCADE"), primary_key=True),
        sqlite_with_rowid=False,
    )
    Index(f"ix_{name}_id", facets.c.id)
    return facets


job_facets = _facets(jobs)

# The jobs whose students teach a job, while they have not ended: it waits for them.
job_teachers = Table(
    "job_teachers",
    metadata,
    _job_id(),
    Column("teacher_job_id", ID, primary_key=True),
)
Index("ix_job_teachers_teacher_job_id", job_teachers.c.teacher_job_id)

# Images that a job's models were asked about. A row lives for an hour; the picture is a file until it is answered.
predictions = Table(
    "predictions",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project", String(100), nullable=False),
    Column("job_id", ID, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("state", String(16), nullable=False),
    # Of the picture's file.
    Column("sha256", SHA256, nullable=False),
    Column("owner", Text),
    Column("lease_until", Double),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("answer", DOCUMENT),
    Column("error", DOCUMENT),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    CheckConstraint("state IN ('waiting', 'running', 'answered', 'failed')", name="state"),
    CheckConstraint("(state = 'running') = (lease_until IS NOT NULL)", name="running_holds_a_lease"),
)
Index("ix_predictions_job_id", predictions.c.job_id)
Index(
    "ix_predictions_waiting",
    predictions.c.created_at,
    predictions.c.id,
    sqlite_where=predictions.c.state.in_(("waiting", "running")),
    postgresql_where=predictions.c.state.in_(("waiting", "running")),
)

job_attempts = Table(
    "job_attempts",
    metadata,
    _job_id(),
    Column("fence", BigInteger, primary_key=True, autoincrement=False),
    Column("attempts_without_progress", Integer, nullable=False),
    Column("owner", Text, nullable=False),
    Column("device", Text),
    Column("started_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("how", String(16)),
    Column("first_step", BigInteger),
    Column("last_step", BigInteger),
    # The number of the last committed batch of writes.
    Column("batch", BigInteger, nullable=False, server_default=text("0")),
)

job_events = Table(
    "job_events",
    metadata,
    _job_id(),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", DOCUMENT, nullable=False),
)

# The alerts that a job's scheduling asks for, by their place in the list. Each is raised once.
job_alerts = Table(
    "job_alerts",
    metadata,
    _job_id(),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("no_progress_s", Double),
    Column("raised_at", Double),
)

metrics = Table(
    "metrics",
    metadata,
    _job_id(),
    Column("trial", String(32), primary_key=True),
    Column("key", String(100), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("epoch", Double),
    Column("value", Double),
    sqlite_with_rowid=False,
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _job_id(),
    Column("fence", BigInteger, primary_key=True, autoincrement=False),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("path", Text, nullable=False),
    Column("sha256", SHA256, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    _job_id(),
    Column("name", String(200), primary_key=True),
    Column("sha256", SHA256, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("media_type", String(200), nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project", String(100), nullable=False),
    Column("filename", Text),
    Column("bytes", BigInteger),
    Column("sha256", SHA256),
    Column("offset", BigInteger, nullable=False, server_default=text("0")),
    Column("status", String(16), nullable=False, server_default=text("'open'")),
    Column("created_at", Double, nullable=False),
    CheckConstraint("status IN ('open', 'complete')", name="status"),
)

Index("ix_uploads_project_id", uploads.c.project, uploads.c.id)


def _registered(name: str, *more: Column[Any]) -> Table:
    table = Table(
        name,
        metadata,
        Column("id", ID, primary_key=True),
        Column("project", String(100), nullable=False),
        Column("name", String(100), nullable=False),
        Column("sha256", SHA256, nullable=False),
        Column("state", String(16), nullable=False, server_default=text("'ready'")),
        # The body of the registration, from which any server can inspect the file. Null in rows of earlier versions.
        Column("request", DOCUMENT),
        # The server that inspects the file, until when, and for the how manieth time the inspection was begun.
        Column("owner", Text),
        Column("lease_until", Double),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("progress", DOCUMENT),
        # Of a refused row the reason; of one that is inspected the end of the attempt before.
        Column("error", DOCUMENT),
        Column("facts", DOCUMENT),
        # The facts that a list shows.
        Column("summary", DOCUMENT),
        Column("labels", LIST, nullable=False, server_default=text("'{}'")),
        Column("warnings", LIST, nullable=False, server_default=text("'[]'")),
        Column("created_at", Double, nullable=False),
        *more,
        UniqueConstraint("project", "name"),
        CheckConstraint("state IN ('inspecting', 'ready', 'refused')", name="state"),
        CheckConstraint("(state = 'inspecting') = (lease_until IS NOT NULL)", name="inspecting_holds_a_lease"),
    )
    Index(f"ix_{name}_created_at", table.c.project, table.c.created_at, table.c.id, table.c.state)
    return table


models = _registered("models")
# `thumbnails` is the digest of their sheet, and the places in it: `api.inspections.Thumbnails`.
datasets = _registered("datasets", Column("thumbnails", DOCUMENT))
model_facets = _facets(models)
dataset_facets = _facets(datasets)

inspections = Table(
    "inspections",
    metadata,
    Column("digest", SHA256, primary_key=True),
    Column("kind", String(32), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("facts", DOCUMENT, nullable=False),
    Column("seen_at", Double, nullable=False),
)

# What was measured once, so that the next job need not pay for it again: the accuracy of a teacher on a data set
# (`evaluation`), the time and memory of a training step (`cost`), the size and speed of networks (`benchmark`) and
# of the files of jobs' students (`files`). By project: none learns what another has.
measurements = Table(
    "measurements",
    metadata,
    Column("project", String(100), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("key", SHA256, primary_key=True),
    Column("figures", DOCUMENT, nullable=False),
    Column("measured_at", Double, nullable=False),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", ID, primary_key=True),
    Column("project", String(100), nullable=False),
    Column("url", Text, nullable=False),
    Column("events", LIST, nullable=False),
    Column("enabled", Boolean, nullable=False),
    # Why the service has disabled it.
    Column("note", Text),
    # As they are: what is sent is signed with them. The earlier one also, for a while.
    Column("secret", String(100), nullable=False),
    Column("earlier_secret", String(100)),
    Column("earlier_until", Double),
    # The first of its failed tries since the last that succeeded.
    Column("failing_since", Double),
    Column("created_at", Double, nullable=False),
)
Index("ix_webhooks_project_id", webhooks.c.project, webhooks.c.id)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", ID, primary_key=True),
    Column("webhook_id", ID, ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("type", String(32), nullable=False),
    Column("data", DOCUMENT, nullable=False),
    Column("status", String(16), nullable=False, server_default=text("'pending'")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    # Of a pending delivery: when it is due, or when the process that sends it must have ended.
    Column("next_at", Double),
    Column("attempted_at", Double),
    Column("answer_status", Integer),
    Column("answer", Text),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
    CheckConstraint("(status = 'pending') = (next_at IS NOT NULL)", name="pending_has_a_time"),
)
Index("ix_webhook_deliveries_webhook_id_id", webhook_deliveries.c.webhook_id, webhook_deliveries.c.id)
Index(
    "ix_webhook_deliveries_due",
    webhook_deliveries.c.next_at,
    sqlite_where=webhook_deliveries.c.status == "pending",
    postgresql_where=webhook_deliveries.c.status == "pending",
)
Index("ix_webhook_deliveries_created_at", webhook_deliveries.c.created_at)

workers = Table(
    "workers",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("host", Text, nullable=False),
    Column("devices", DOCUMENT, nullable=False),
    Column("current_job", ID),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
)

# What a key of a request (`Idempotency-Key`) has made: `resource` is the row's id in the table `kind`.
idempotency = Table(
    "idempotency",
    metadata,
    Column("project", String(100), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("resource", String(100), nullable=False),
    Column("digest", SHA256, nullable=False),
    Column("created_at", Double, nullable=False),
)
Index("ix_idempotency_kind_resource", idempotency.c.kind, idempotency.c.resource)

# Who did what to which resource. Rows are added, and deleted by age; nothing changes them.
audit = Table(
    "audit",
    metadata,
    Column("id", ID, primary_key=True),
    Column("at", Double, nullable=False),
    # Null if no key names the project: a wrong key.
    Column("project", String(100)),
    Column("key_id", ID),
    Column("key_name", String(100)),
    Column("role", String(16)),
    Column("action", String(64), nullable=False),
    Column("resource", String(200)),
    Column("address", String(64)),
    Column("request_id", String(80)),
    Column("outcome", String(16), nullable=False),
    Column("details", DOCUMENT, nullable=False),
    CheckConstraint("outcome IN ('done', 'refused')", name="outcome"),
)
Index("ix_audit_project_id", audit.c.project, audit.c.id)
Index("ix_audit_project_action_id", audit.c.project, audit.c.action, audit.c.id)
Index("ix_audit_project_resource_id", audit.c.project, audit.c.resource, audit.c.id)
Index("ix_audit_at", audit.c.at)

collections = Table(
    "collections",
    metadata,
    Column("id", ID, primary_key=True),
    Column("host", Text, nullable=False),
    Column("began_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("removed", DOCUMENT),
    Column("error", Text),
)
