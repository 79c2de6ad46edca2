"""The coverage of a report's intervals, in few rounds with a fixed seed: 1,000 have a standard error of 0.7 points."""

import numpy as np
import pytest

from bench.intervals import Setting, coverage, seeds_coverage

ROUNDS, RESAMPLES = 1000, 1500
RIGHT = pytest.approx(0.95, abs=0.02)


def test_combinations_have_the_accuracies_of_the_setting():
    chances = Setting(100, 0.75, 0.7, 0.8).combinations()
    cell = np.arange(8)
    assert [float(chances @ (cell >> place & 1)) for place in range(3)] == pytest.approx([0.75, 0.7, 0.8], abs=1e-3)
    assert chances[7] > 0.75 * 0.7 * 0.8, "what is difficult for one model is for the others, too"


@pytest.mark.parametrize(
    "setting",
    [Setting(200, 0.75, 0.7, 0.85), Setting(2000, 0.7, 0.7, 0.8), Setting(10_000, 0.95, 0.93, 0.97)],
    ids=str,
)
def test_coverage_over_images_is_95_percent_where_the_gap_is_stated(setting):
    found = coverage(setting, ROUNDS, RESAMPLES)
    assert found.stated > 0.9
    assert (found.gain, found.gap_closed) == (RIGHT, RIGHT)


def test_coverage_no_gap_is_stated_to_a_teacher_that_is_no_better():
    found = coverage(Setting(1000, 0.73, 0.7, 0.7), 400, RESAMPLES)
    assert found.stated <= 0.05 and found.gain == RIGHT


def test_coverage_of_a_small_gap_is_that_of_what_is_stated_and_most_is_refused():
    found = coverage(Setting(200, 0.72, 0.7, 0.73), 400, RESAMPLES)
    assert found.stated < 0.25 and found.gap_or_refusal > 0.95


@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_over_seeds_is_at_least_95_percent_for_the_same_images_and_for_others(seeds):
    same, other = seeds_coverage(Setting(500, 0.75, 0.70, 0.80), seeds, 200)
    for found in (same, other):
        assert found.gain == pytest.approx(0.95, abs=0.04)
        assert found.gap_or_refusal > 0.92
