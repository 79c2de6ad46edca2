"""A job's curves. Long curves are thinned here, so that an answer stays small however many steps a job has."""

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from store import tables
from store.attempts import lock_owned_job
from store.records import upsert

Point = tuple[int, float | None]
"""Step and value."""


def record(
    connection: Connection,
    job_id: str,
    fence: int,
    trial: str,
    *,
    step: int,
    epoch: float | None,
    values: dict[str, float | None],
) -> None:
    """Write the values measured at a step. A resumed attempt, which repeats steps, replaces them.

    NaN and infinity (a diverged loss) become None, because JSON cannot express them.
    """
    lock_owned_job(connection, job_id, fence)
    rows = [
        {"job_id": job_id, "trial": trial, "key": key, "step": step, "epoch": epoch, "value": _finite(value)}
        for key, value in values.items()
    ]
    if not rows:
        return
    added = upsert(connection, tables.metrics)
    same = [column.name for column in tables.metrics.primary_key]
    replaced = {"epoch": added.excluded.epoch, "value": added.excluded.value}
    connection.execute(added.on_conflict_do_update(index_elements=same, set_=replaced), rows)


def series(
    connection: Connection,
    job_id: str,
    keys: Sequence[str] | None = None,
    after_step: int | None = None,
    max_points: int = 500,
) -> dict[str, dict[str, list[Point]]]:
    """Return the curves by trial and key, each thinned to at most `max_points` (two or more)."""
    rows = tables.metrics
    query = select(rows.c.trial, rows.c.key, rows.c.step, rows.c.value).where(rows.c.job_id == job_id)
    if keys is not None:
        query = query.where(rows.c.key.in_(keys))
    if after_step is not None:
        query = query.where(rows.c.step > after_step)
    trials: dict[str, dict[str, list[Point]]] = {}
    for trial, key, step, value in connection.execute(query.order_by(rows.c.trial, rows.c.key, rows.c.step)):
        trials.setdefault(trial, {}).setdefault(key, []).append((step, value))
    return {
        trial: {key: thinned(points, max_points) for key, points in curves.items()} for trial, curves in trials.items()
    }


def thinned(points: list[Point], max_points: int) -> list[Point]:
    """Return at most `max_points` points: the first, the last, and the extremes of equal buckets between them."""
    if len(points) <= max_points:
        return points
    inner, buckets = points[1:-1], (max_points - 2) // 2
    chosen = {points[0], points[-1]}
    for bucket in range(buckets):
        part = inner[len(inner) * bucket // buckets : len(inner) * (bucket + 1) // buckets]
        measured = [point for point in part if point[1] is not None]
        chosen.update((min(measured, key=_value), max(measured, key=_value)) if measured else part[:1])
    return sorted(chosen, key=lambda point: point[0])


def _value(point: Point) -> Any:
    return point[1]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
