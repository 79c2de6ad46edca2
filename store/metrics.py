"""A job's curves. What is asked for is thinned here, so that a year of steps never crosses the wire."""

import math
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from store import tables
from store.conflict import insert
from store.fence import require

Point = tuple[int, float | None]


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
    """Write what was measured at a step; again for the same step replaces it, as a resumed attempt does.

    What is no number (a diverged loss) is kept as a hole: JSON has no word for it.
    """
    require(connection, job_id, fence)
    rows = [
        {"job_id": job_id, "trial": trial, "key": key, "step": step, "epoch": epoch, "value": _finite(value)}
        for key, value in values.items()
    ]
    if not rows:
        return
    adding = insert(connection, tables.metrics)
    same = [column.name for column in tables.metrics.primary_key]
    replacing = {"epoch": adding.excluded.epoch, "value": adding.excluded.value}
    connection.execute(adding.on_conflict_do_update(index_elements=same, set_=replacing), rows)


def series(
    connection: Connection,
    job_id: str,
    keys: Sequence[str] | None = None,
    after_step: int | None = None,
    max_points: int = 500,
) -> dict[str, dict[str, list[Point]]]:
    """By trial and key, at most `max_points` (two or more) points of each curve, peaks and valleys among them."""
    rows = tables.metrics
    wanted = select(rows.c.trial, rows.c.key, rows.c.step, rows.c.value).where(rows.c.job_id == job_id)
    if keys is not None:
        wanted = wanted.where(rows.c.key.in_(keys))
    if after_step is not None:
        wanted = wanted.where(rows.c.step > after_step)
    found: dict[str, dict[str, list[Point]]] = {}
    for trial, key, step, value in connection.execute(wanted.order_by(rows.c.trial, rows.c.key, rows.c.step)):
        found.setdefault(trial, {}).setdefault(key, []).append((step, value))
    return {
        trial: {key: thinned(points, max_points) for key, points in curves.items()} for trial, curves in found.items()
    }


def thinned(points: list[Point], max_points: int) -> list[Point]:
    """First, last, and the lowest and highest of each equal bucket between them; all, where they are few enough."""
    if len(points) <= max_points:
        return points
    inner, buckets = points[1:-1], (max_points - 2) // 2
    kept = {points[0], points[-1]}
    for bucket in range(buckets):
        part = inner[len(inner) * bucket // buckets : len(inner) * (bucket + 1) // buckets]
        measured = [point for point in part if point[1] is not None]
        kept.update((min(measured, key=_value), max(measured, key=_value)) if measured else part[:1])
    return sorted(kept, key=lambda point: point[0])


def _value(point: Point) -> Any:
    return point[1]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
