import math

import pytest

from kdcore.measure.chance import chance_level, is_at_chance, sign_test, wilson


def test_wilson_of_a_half():
    """8 of 16, z = 1.96: centre 0.5, half-width z/(1 + z²/16) · √(0.25/16 + z²/1024) = 0.2200."""
    assert wilson(0.5, 16) == pytest.approx((0.2800, 0.7200), abs=1e-4)


def test_wilson_never_leaves_zero_to_one():
    low, high = wilson(0.0, 10)
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(0.2775, abs=1e-4)
    low, high = wilson(1.0, 10)
    assert high == pytest.approx(1) and low == pytest.approx(0.7225, abs=1e-4)


def test_wilson_is_narrower_with_more_images():
    assert wilson(0.7, 1000)[0] > wilson(0.7, 100)[0]


@pytest.mark.parametrize(
    ("better", "worse", "probability"),
    [(0, 0, 1), (1, 0, 1 / 2), (3, 0, 1 / 8), (3, 1, 5 / 16), (2, 2, 11 / 16), (1, 3, 15 / 16), (0, 4, 1)],
)
def test_sign_test_is_exact(better, worse, probability):
    assert sign_test(better, worse) == pytest.approx(probability)


def test_sign_test_of_many_pairs_stays_finite():
    assert 0 < sign_test(1100, 900) < 1e-4
    assert sign_test(5000, 5000) == pytest.approx(0.5, abs=0.01)
    assert math.isfinite(sign_test(9000, 1))


def test_chance_level_is_the_largest_share():
    assert chance_level([10, 10, 10, 10]) == 0.25
    assert chance_level([90, 10]) == 0.9


@pytest.mark.parametrize(
    ("accuracy", "images", "level", "at_chance"),
    [
        (0.25, 1000, 0.25, True),
        (0.27, 1000, 0.25, True),
        (0.35, 1000, 0.25, False),
        (0.5, 10, 0.25, False),  # Ten images tell nothing.
        (0.2, 10, 0.25, True),  # But this is not better than guessing.
        (0.011, 10_000, 0.01, True),
        (0.05, 1000, 0.01, False),
    ],
)
def test_is_at_chance(accuracy, images, level, at_chance):
    assert is_at_chance(accuracy, images, level) == at_chance
