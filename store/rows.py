"""A job as the database keeps it, and how any row becomes a plain frozen record."""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sqlalchemy import Column, Row, Table

from store import tables

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    id: str
    project: str
    name: str | None
    status: str
    phase: str | None
    method: str
    spec: dict[str, Any]
    resolved_spec: dict[str, Any]
    result: dict[str, Any] | None
    """The report, once the job has succeeded."""
    error: dict[str, Any] | None
    progress: dict[str, Any] | None
    fence: int
    """Counts claims; whoever holds an older number is turned away."""
    owner: str | None
    attempts_without_progress: int
    """Claims since the job last got somewhere."""
    max_attempts: int
    requested: str | None
    """Asked of a running job: `cancel` or `pause`."""
    priority: int
    event_seq: int
    """The number of the job's last event."""
    checkpoint_step: int | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    lease_until: float | None
    not_before: float | None
    deadline_s: float | None
    deadline_at: float | None


def columns(table: Table, record: type[Any]) -> list[Column[Any]]:
    """The columns that a record's fields are named after, in their order."""
    return [table.c[field.name] for field in fields(record)]


def as_record(record: type[T], row: Row[*tuple[Any, ...]]) -> T:
    """A row of exactly those columns, in their order."""
    return record(*row)


JOB = columns(tables.jobs, Job)
