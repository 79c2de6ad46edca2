"""What was measured of the speed of networks: benchmarks, under the digest of what was asked for, and the files of
jobs' students. They are rows of `measurements`, written with the success of their job.

A benchmark is kept when its job is deleted, since it says how fast a network is, for any caller. What a job says of its
own student goes with the job.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, and_, desc, or_, select

from base.jobs import TERMINAL
from store.records import JOB_COLUMNS, Job, as_record
from store.tables import job_facets, jobs, measurements

Kind = Literal["benchmark", "files"]
_ROWS = measurements.c
_COLUMNS = (_ROWS.key, _ROWS.figures, _ROWS.measured_at)


@dataclass(frozen=True)
class Speed:
    """One row. `figures` is a benchmark's report, or what `files_row` of `kdcore.spec.measured` returns."""

    key: str
    figures: dict[str, Any]
    measured_at: float


def key_of_files(job_id: str) -> str:
    """Return the key under which what a job has measured of its student's files is kept."""
    return hashlib.sha256(job_id.encode()).hexdigest()


def get(connection: Connection, project: str, key: str) -> Speed | None:
    """Return what is kept of a benchmark."""
    query = select(*_COLUMNS).where(_ROWS.project == project, _ROWS.kind == "benchmark", _ROWS.key == key)
    row = connection.execute(query).one_or_none()
    return None if row is None else Speed(*row)


def newest(connection: Connection, project: str, kind: Kind, limit: int, after: str | None = None) -> list[Speed]:
    """Return what was measured in a project, the newest first, without the files of deleted jobs. `after`: the key of
    the last row before."""
    of_kind = and_(_ROWS.project == project, _ROWS.kind == kind)
    query = select(*_COLUMNS).where(of_kind)
    if after is not None:
        at = select(_ROWS.measured_at).where(of_kind, _ROWS.key == after).scalar_subquery()
        query = query.where(or_(_ROWS.measured_at < at, and_(_ROWS.measured_at == at, _ROWS.key < after)))
    rows = connection.execute(query.order_by(desc(_ROWS.measured_at), desc(_ROWS.key)).limit(limit))
    found = [Speed(*row) for row in rows]
    if kind == "benchmark":
        return found
    of_jobs = {one.figures["job"] for one in found}
    there = set(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(of_jobs)))) if of_jobs else set()
    return [one for one in found if one.figures["job"] in there]


def benchmark_job(connection: Connection, project: str, key: str, *, open_only: bool = False) -> Job | None:
    """Return the newest job that measures, or has measured, what has this key. `open_only`: one that has not ended."""
    facet = job_facets.c
    naming = and_(facet.project == project, facet.facet == "benchmark", facet.value == key)
    query = select(*JOB_COLUMNS).select_from(jobs.join(job_facets, facet.id == jobs.c.id)).where(naming)
    if open_only:
        query = query.where(jobs.c.status.not_in(TERMINAL))
    row = connection.execute(query.order_by(jobs.c.id.desc()).limit(1)).one_or_none()
    return None if row is None else as_record(Job, row)
