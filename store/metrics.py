"""A job's curves. Long curves are thinned here, so that an answer stays small however many steps a job has."""

import math
from collections.abc import Iterable, Sequence
from itertools import groupby, islice
from typing import Any

from sqlalchemy import Connection, func, select

from store import tables
from store.attempts import lock_owned_job
from store.records import upsert

ROWS_AT_ONCE = 1000
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
    """Return the curves by trial and key, each thinned to at most `max_points` (two or more).

    The points of a curve are counted first and then thinned as they are read, so that no more of them are in memory
    than are returned.
    """
    rows = tables.metrics
    conditions = [rows.c.job_id == job_id]
    if keys is not None:
        conditions.append(rows.c.key.in_(keys))
    if after_step is not None:
        conditions.append(rows.c.step > after_step)
    counted = select(rows.c.trial, rows.c.key, func.count()).where(*conditions).group_by(rows.c.trial, rows.c.key)
    counts = {(trial, key): count for trial, key, count in connection.execute(counted)}
    ordered = select(rows.c.trial, rows.c.key, rows.c.step, rows.c.value).where(*conditions)
    found = connection.execute(
        ordered.order_by(rows.c.trial, rows.c.key, rows.c.step), execution_options={"yield_per": ROWS_AT_ONCE}
    )
    trials: dict[str, dict[str, list[Point]]] = {}
    for (trial, key), points in groupby(found, key=lambda row: (row[0], row[1])):
        # Points that were added since the count are of the last bucket.
        thin = thinned(((step, value) for _, _, step, value in points), counts.get((trial, key), 0), max_points)
        trials.setdefault(trial, {})[key] = thin
    return trials


def thinned(points: Iterable[Point], count: int, max_points: int) -> list[Point]:
    """Return at most `max_points` of about `count` points: the first, the last, and the extremes of equal buckets
    between them. Where nothing was measured in a whole bucket, its first point stays, so that the gap is seen."""
    if count <= max_points:
        return list(islice(points, max_points))
    buckets, between = (max_points - 2) // 2, count - 2
    chosen: list[Point] = []
    lowest = highest = gap = last = None
    at = 0
    for place, point in enumerate(points):
        if place == 0:
            chosen.append(point)
            continue
        if last is not None and buckets:
            # The point before belongs to a bucket: it was not the last one.
            bucket = min(buckets - 1, (place - 2) * buckets // between)
            if bucket != at:
                chosen += _extremes(lowest, highest, gap)
                lowest = highest = gap = None
                at = bucket
            if last[1] is None:
                gap = gap or last
            else:
                lowest = last if lowest is None or _value(last) < _value(lowest) else lowest
                highest = last if highest is None or _value(last) > _value(highest) else highest
        last = point
    chosen += _extremes(lowest, highest, gap)
    return [*chosen, last] if last is not None else chosen


def _extremes(lowest: Point | None, highest: Point | None, gap: Point | None) -> list[Point]:
    if lowest is None or highest is None:
        return [gap] if gap is not None else []
    return sorted({lowest, highest}, key=lambda point: point[0])


def _value(point: Point) -> Any:
    return point[1]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
