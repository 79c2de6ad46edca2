import math

import pytest

from store import metrics
from store.database import Database
from store.metrics import thinned
from tests.store.helpers import running


def test_series_by_trial_and_key(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        metrics.record(connection, job_id, 1, "alone", step=2, epoch=0.5, values={"train/loss": 3.0})
        metrics.record(connection, job_id, 1, "student", step=2, epoch=0.5, values={"train/loss": 2.0, "train/lr": 0.1})
        metrics.record(connection, job_id, 1, "student", step=1, epoch=0.2, values={"train/loss": 2.5})
        metrics.record(connection, job_id, 1, "student", step=3, epoch=0.7, values={})
        assert metrics.series(connection, job_id) == {
            "alone": {"train/loss": [(2, 3.0)]},
            "student": {"train/loss": [(1, 2.5), (2, 2.0)], "train/lr": [(2, 0.1)]},
        }
        assert metrics.series(connection, job_id, ["train/lr"]) == {"student": {"train/lr": [(2, 0.1)]}}
        assert metrics.series(connection, job_id, after_step=1)["student"]["train/loss"] == [(2, 2.0)]
        assert metrics.series(connection, job_id, after_step=2) == {}


def test_record_replaces_a_repeated_step(database: Database):
    job_id = running(database).job.id
    with database.begin() as connection:
        for value in (1.0, 0.75):
            metrics.record(connection, job_id, 1, "student", step=1, epoch=1, values={"loss": value})
        assert metrics.series(connection, job_id) == {"student": {"loss": [(1, 0.75)]}}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_record_stores_what_is_no_number_as_none(database: Database, value: float | None):
    job_id = running(database).job.id
    with database.begin() as connection:
        metrics.record(connection, job_id, 1, "student", step=1, epoch=1, values={"loss": value})
        assert metrics.series(connection, job_id) == {"student": {"loss": [(1, None)]}}


def test_thinned_returns_few_points_unchanged():
    points = [(step, float(step)) for step in range(10)]
    assert thinned(points, len(points), 10) == points


def test_thinned_keeps_the_ends_and_extremes():
    """1,000 equal points but for one high and one low, thinned to 10."""
    points = [(step, 1.0) for step in range(1000)]
    points[333], points[777] = (333, 9.0), (777, -9.0)
    chosen = thinned(points, len(points), 10)
    assert len(chosen) <= 10
    assert chosen == sorted(chosen)
    assert {points[0], points[333], points[777], points[-1]} <= set(chosen)


@pytest.mark.parametrize("max_points", [2, 3, 4, 7, 500])
def test_thinned_never_exceeds_max_points(max_points: int):
    points = [(step, math.sin(step)) for step in range(3000)]
    assert 2 <= len(thinned(iter(points), len(points), max_points)) <= max_points


def test_thinned_curve_without_values():
    assert {value for _, value in thinned([(step, None) for step in range(100)], 100, 10)} == {None}


def test_thinned_keeps_the_extremes_of_each_bucket_in_order():
    """Ten points in two buckets of four between the ends: the extremes are 5 and 1, 8 and 3."""
    values = [0.0, 2.0, 5.0, 1.0, 3.0, 8.0, None, 4.0, 3.0, 7.0]
    points = list(enumerate(values))
    assert thinned(points, len(points), 6) == [(0, 0.0), (2, 5.0), (3, 1.0), (5, 8.0), (8, 3.0), (9, 7.0)]


def test_thinned_stays_within_its_bound_if_points_were_added_since_the_count():
    points = [(step, float(step % 7)) for step in range(100)]
    chosen = thinned(points, 50, 10)
    assert len(chosen) <= 10
    assert (chosen[0], chosen[-1]) == (points[0], points[-1])
