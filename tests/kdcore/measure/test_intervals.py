import math

import numpy as np
import pytest

from kdcore.measure import intervals
from kdcore.measure.intervals import mean_over_seeds, over_seeds, over_seeds_and_images, paired, t_quantile


def rights(count: int, *spans: tuple[int, int]) -> list[np.ndarray]:
    images = np.arange(count)
    return [(images >= begin) & (images < end) for begin, end in spans]


def test_paired_values_are_differences_of_accuracies_and_their_ratio():
    found = paired(*rights(200, (0, 150), (0, 140), (0, 180)))
    assert found.gain.value == pytest.approx(0.05)
    assert found.teacher_gap is not None and found.teacher_gap.value == pytest.approx(0.2)
    assert found.gap_closed is not None and found.gap_closed.value == pytest.approx(0.25)


def test_paired_interval_of_the_gain_is_that_of_the_normal_approximation_on_many_images():
    """Var(student - alone) = (p10 + p01 - (p10 - p01)²) / n of the images on which one of the two is right."""
    student, alone = rights(10_000, (1000, 8000), (0, 6500))
    gain, apart = 0.05, 0.15 + 0.10
    half = 1.96 * math.sqrt((apart - gain**2) / 10_000)
    found = paired(student, alone).gain
    assert (found.low, found.high) == pytest.approx((gain - half, gain + half), abs=4e-4)


def test_paired_interval_of_the_gap_closed_is_fieller_s_on_many_images():
    student, alone, teacher = rights(10_000, (500, 8000), (1000, 7800), (0, 9000))
    gains, gaps = student.astype(float) - alone, teacher.astype(float) - alone
    covariances = np.cov(np.stack([gains, gaps])) / 10_000
    fieller = intervals._ratio(gains.mean(), gaps.mean(), covariances, 1.96)
    found = paired(student, alone, teacher).gap_closed
    assert found is not None and fieller is not None
    assert (found.low, found.high) == pytest.approx((fieller.low, fieller.high), abs=6e-3)


def test_paired_of_equal_answers_has_an_interval_about_0():
    found = paired(*rights(100, (0, 90), (0, 90))).gain
    assert found.value == 0 and -0.04 < found.low < 0 < found.high < 0.04


def test_paired_has_the_same_intervals_each_time_and_whatever_the_order_of_images():
    models = np.stack(rights(300, (0, 200), (50, 230), (0, 260)))
    shuffled = models[:, np.random.default_rng(0).permutation(300)]
    assert paired(*models) == paired(*models) == paired(*shuffled)


@pytest.mark.parametrize("teacher", [(0, 90), (0, 101), (0, 60), (0, 130)])
def test_paired_states_a_gap_exactly_if_the_interval_of_the_teacher_s_gap_is_above_0(teacher):
    found = paired(*rights(200, (0, 100), (0, 95), teacher))
    assert found.teacher_gap is not None
    assert (found.gap_closed is not None) == (found.teacher_gap.low > 0)


@pytest.mark.parametrize("gain", range(-8, 9))
def test_paired_gap_closed_holds_0_exactly_if_the_gain_does(gain):
    found = paired(*rights(200, (0, 100 + gain), (0, 100), (0, 112)))
    assert found.gap_closed is not None and found.gap_closed.holds_zero == found.gain.holds_zero


@pytest.mark.parametrize("images", [1, 2, 5])
def test_paired_of_few_images_holds_its_own_values(images):
    found = paired(*rights(images, (0, images), (0, 0), (0, images)))
    assert found.gain.low < 1 and found.gain.high == found.gain.value == 1


def test_ratios_with_denominators_of_both_signs_are_the_ends_of_what_neither_tail_excludes():
    """39 of 40 denominators are positive: at any r, a resample is above 0 if r is below (above) its own ratio."""
    rng = np.random.default_rng(3)
    numerators, denominators = rng.normal(1, 0.5, 400), np.abs(rng.normal(2, 0.7, 400)) + 0.01
    denominators[:4] *= -1
    low, high = intervals._ratios(numerators, denominators)
    grid = np.linspace(-50, 50, 200_001)
    above = (numerators[:, None] > denominators[:, None] * grid[None, ::100]).mean(0)
    inside = grid[::100][(above > 0.025) & (above < 0.975)]
    assert (low, high) == pytest.approx((inside.min(), inside.max()), abs=0.06)


@pytest.mark.parametrize(
    ("df", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1e9, 1.95996)]
)
def test_t_quantile_is_that_of_the_tables(df, quantile):
    assert t_quantile(df) == pytest.approx(quantile, rel=2e-4)


def test_over_seeds_is_student_s_t_of_the_gains():
    """Gains 1, 2 and 3 %: mean 2 %, deviation 1 %, t 4.303."""
    gain, none = over_seeds(np.array([0.71, 0.72, 0.73]), np.array([0.7, 0.7, 0.7]), 1000)
    half = 4.30265 * 0.01 / math.sqrt(3)
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.02, 0.02 - half, 0.02 + half), abs=1e-5)
    assert none is None


def test_over_seeds_ends_where_accuracies_and_their_differences_end():
    """Two seeds: t is 12.7, so that the interval of 4.6 and 2.8 % would begin at -7.7 %."""
    low = mean_over_seeds(np.array([0.046, 0.028]), 1000)
    assert (low.value, low.low, low.high) == pytest.approx((0.037, 0.0, 0.037 + 12.7062 * 0.009), abs=1e-5)
    assert mean_over_seeds(np.array([0.99, 0.95]), 100).high == 1.0
    gain, _ = over_seeds(np.array([0.9, 0.4]), np.array([0.1, 0.4]), 10)
    assert (gain.low, gain.high) == (-1.0, 1.0)


def test_over_seeds_that_are_right_on_as_many_images_are_known_to_the_image_alone():
    """Two seeds, 50 images: rounding has the variance 0.02 squared / 12, and t is 12.7."""
    same = np.array([0.8, 0.8])
    half = 12.7062 * 0.02 / math.sqrt(12) / math.sqrt(2)
    mean, (gain, closed) = mean_over_seeds(same, 50), over_seeds(same, same - 0.1, 50, 0.96)
    assert mean.high - mean.value == pytest.approx(half, rel=1e-5)
    assert gain.high - gain.value == pytest.approx(half * math.sqrt(2), rel=1e-5)
    assert closed is not None and closed.low < closed.value < closed.high


def test_over_seeds_gap_closed_of_baselines_without_spread_is_the_gain_in_units_of_the_gap():
    gain, closed = over_seeds(np.array([0.71, 0.72, 0.73]), np.array([0.7, 0.7, 0.7]), 10**6, 0.75)
    assert closed is not None
    assert [20 * one for one in vars(gain).values()] == pytest.approx(list(vars(closed).values()))


def test_over_seeds_states_no_gap_to_a_teacher_within_the_spread_of_the_baselines():
    assert over_seeds(np.array([0.8, 0.8]), np.array([0.65, 0.75]), 100, 0.72)[1] is None
    assert over_seeds(np.array([0.8, 0.8]), np.array([0.7, 0.7]), 100, 0.6)[1] is None


def test_over_seeds_and_images_of_seeds_that_all_answer_alike_is_the_interval_over_images():
    student, alone = rights(400, (0, 300), (20, 290))
    both, _ = over_seeds_and_images(np.stack([student] * 5), np.stack([alone] * 5))
    differences = student.astype(float) - alone
    half = 1.96 * math.sqrt(differences.var(ddof=1) / 400)
    assert (both.value, both.low) == pytest.approx((differences.mean(), differences.mean() - half), rel=1e-3)


def test_over_seeds_and_images_is_wider_than_over_seeds_alone():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=300)
    student = difficulty + 0.5 * rng.normal(size=(6, 300)) < 0.7
    alone = difficulty + 0.5 * rng.normal(size=(6, 300)) < 0.5
    teacher = difficulty + 0.5 * rng.normal(size=300) < 1.2
    same = over_seeds(student.mean(1), alone.mean(1), 300, float(teacher.mean()))
    other = over_seeds_and_images(student, alone, teacher)
    for one, wider in zip(same, other, strict=True):
        assert one is not None and wider is not None and one.value == pytest.approx(wider.value)
        assert wider.low < one.low and one.high < wider.high
