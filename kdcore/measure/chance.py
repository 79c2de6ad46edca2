"""The statistics behind findings about accuracies: an interval, a paired test, and what counts as chance.

Shapes: n images. Every function takes plain counts and fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
CERTAIN = 1e-3
"""The largest probability, under pure chance, at which a difference between two models is called certain."""


def wilson(accuracy: float, images: float) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy (fraction of 1) measured on so many images (Wilson 1927).

    The number may be fractional: the effective size of a weighted sample.
    """
    right, square = accuracy * images, Z95 * Z95
    centre = (right + square / 2) / (images + square)
    half = Z95 / (images + square) * math.sqrt(right * (images - right) / images + square / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_test(better: int, worse: int) -> float:
    """Return the probability that fair coins give `better` or more of `better + worse` (exact, one-sided).

    The exact form of McNemar's test (1947): only images on which exactly one of two models is right tell them apart.
    """
    pairs = better + worse
    if pairs == 0:
        return 1.0
    if better * 2 <= pairs:
        return 1.0 if better == 0 else 1.0 - _tail(worse + 1, pairs)
    return _tail(better, pairs)


def _tail(least: int, pairs: int) -> float:
    """P(X ≥ least), X binomial of so many fair coins. Logarithms: 2^pairs leaves the range of a float."""
    logs = [
        math.lgamma(pairs + 1) - math.lgamma(x + 1) - math.lgamma(pairs - x + 1) - pairs * math.log(2)
        for x in range(least, pairs + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def chance_level(counts: Sequence[int]) -> float:
    """Return the accuracy that needs no picture: 1/K, or the share of the largest class. `counts`: images by class."""
    return max(1 / len(counts), max(counts) / max(1, sum(counts)))


def is_at_chance(accuracy: float, images: float, level: float) -> bool:
    """Return True if an accuracy cannot be distinguished from chance, and is certainly not far above it.

    Few images cannot tell anything: then the answer is False, unless the accuracy itself is no better than chance.
    """
    low, high = wilson(accuracy, images)
    return accuracy <= level or (low <= level and high < min(2 * level, (1 + level) / 2))
