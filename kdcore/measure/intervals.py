"""95 % intervals of the gain and of the gap closed: over the test images, over seeds, and over both. NumPy alone.

Over images: a paired bootstrap. What three models say of an image is one of eight combinations of right and wrong, so a
resample of the images is a resample of eight counts, the same for all models. The weights are continuous (the Bayesian
bootstrap, Rubin 1981), so that no resample divides by zero, and each combination begins with half an image (Jeffreys'
prior; for a pair of models that is the correction of Agresti & Min 2005): without it, models that differ on no image
would have an interval of length zero. Resampling is not stratified by class: an interval is for other images of the
same kind, whose classes are drawn, too, and within a class of one image nothing could be resampled.

The gap closed is a ratio. Its interval has every ratio r for which the interval of (student - alone) - r (teacher -
alone) holds 0 (Fieller 1954), from the same resamples. So it is bounded exactly if the interval of teacher - alone
holds no 0, and it holds 0 exactly if the interval of the gain does: no two figures of a report contradict each other.

`bench/intervals.py` measures the coverage. Shapes: n images, m seeds, R resamples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 10_000
SEED = 20_250_101
"""Of the resampling: two reports on the same answers have the same intervals."""
SEEDS_FOR_IMAGES_TOO = 5
"""The least number of seeds from which an interval over seeds and images together is given."""
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_PER_PAIR = 4.0
"""Images that are added, spread evenly over all combinations: one for each of the four of any pair of models."""
_LARGEST_DF = 10_000.0

Rights = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, in fractions of 1."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """What a student's answers prove beside those of the same student alone, and of the teacher."""

    gain: Interval
    """Student - alone."""
    teacher_gap: Interval | None
    """Teacher - alone; None without a teacher."""
    gap_closed: Interval | None
    """Gain / teacher gap; None unless the interval of the teacher gap is above 0."""


def paired(student_n: Rights, alone_n: Rights, teacher_n: Rights | None = None, resamples: int = RESAMPLES) -> Paired:
    """Return the intervals over test images, from which images each model is right on."""
    models = [student_n, alone_n] if teacher_n is None else [student_n, alone_n, teacher_n]
    combination_n = sum(one.astype(np.int64) << place for place, one in enumerate(models))
    return of_counts(np.bincount(combination_n, minlength=2 ** len(models)), resamples)


def of_counts(counts: NDArray[np.int64], resamples: int = RESAMPLES) -> Paired:
    """Return the intervals from the number of images of each combination: bit 0 is set where the student is right,
    bit 1 where the same student alone is, bit 2 (if there are eight) where the teacher is."""
    combination = np.arange(len(counts))
    student, alone, teacher = ((combination >> place & 1).astype(np.float64) for place in range(3))
    images = max(1, int(counts.sum()))
    gain, gap = (float(counts @ one) / images for one in (student - alone, teacher - alone))
    generator = np.random.default_rng(SEED)
    weights_R = generator.standard_gamma(counts + _PER_PAIR / len(counts), size=(resamples, len(counts)))
    weights_R /= weights_R.sum(1, keepdims=True)
    gains_R = weights_R @ (student - alone)
    found = Paired(_percentiles(gain, gains_R), None, None)
    if len(counts) < 8:
        return found
    gaps_R = weights_R @ (teacher - alone)
    teacher_gap = _percentiles(gap, gaps_R)
    closed = None
    if teacher_gap.low > 0:
        low, high = _ratios(gains_R, gaps_R)
        closed = _around(gain / gap, low, high)
    return replace(found, teacher_gap=teacher_gap, gap_closed=closed)


def mean_over_seeds(values_m: Floats, images: int) -> Interval:
    """Return the mean of accuracies on so many images, one of each seed, with Student's t-interval. Needs two seeds."""
    variance = max(float(values_m.var(ddof=1)), _rounding(images)) / len(values_m)
    return _symmetric(float(values_m.mean()), t_quantile(len(values_m) - 1) * variance**0.5, least=0.0)


def _rounding(images: int) -> float:
    """Return the least variance of an accuracy that is a multiple of 1 / images: that of its rounding. Without it, two
    seeds that are right on as many images would have an interval of length zero."""
    return 1 / (12 * images**2)


def over_seeds(
    student_m: Floats, alone_m: Floats, images: int, teacher: float | None = None
) -> tuple[Interval, Interval | None]:
    """Return gain and gap closed as means over seeds, with intervals for other seeds on the same images, from
    accuracies on so many: Student's t, and Fieller's form of it for the ratio. Needs two seeds."""
    gains_m, gaps_m = student_m - alone_m, (0.0 if teacher is None else teacher) - alone_m
    t = t_quantile(len(gains_m) - 1)
    covariances = np.cov(np.stack([gains_m, gaps_m]))
    least = _rounding(images) * np.array([2.0, 1.0])  # A gain is the difference of two accuracies that vary.
    np.fill_diagonal(covariances, np.maximum(covariances.diagonal(), least))
    covariances /= len(gains_m)
    gain = float(gains_m.mean())
    interval = _symmetric(gain, t * float(covariances[0, 0]) ** 0.5)
    return interval, None if teacher is None else _ratio(gain, float(gaps_m.mean()), covariances, t)


def over_seeds_and_images(
    student_mn: Rights, alone_mn: Rights, teacher_n: Rights | None = None
) -> tuple[Interval, Interval | None]:
    """Return gain and gap closed as means over seeds, with intervals for other seeds and other images at once.

    Two-way analysis of variance with random seeds and random images: the variance of a mean over both is (MS_seeds +
    MS_images - MS_rest) / (m n), with Hillis' degrees of freedom (Statistics in Medicine 2007): what readers and cases
    are in studies of diagnoses. The gap closed is the ratio of the means, by Fieller; None unless it is bounded.
    """
    gains_mn = student_mn.astype(np.float64) - alone_mn
    gain, of_gain, df = _two_way(gains_mn)
    t = t_quantile(df)
    interval = _symmetric(gain, t * of_gain**0.5)
    if teacher_n is None:
        return interval, None
    gaps_mn = teacher_n.astype(np.float64)[None] - alone_mn
    gap, of_gap, _ = _two_way(gaps_mn)
    _, of_sum, _ = _two_way(gains_mn + gaps_mn)
    both = (of_sum - of_gain - of_gap) / 2
    return interval, _ratio(gain, gap, np.array([[of_gain, both], [both, of_gap]]), t)


def t_quantile(df: float) -> float:
    """Return the 97.5 % quantile of Student's t with so many degrees of freedom, 1 or more; not whole ones, too.

    With x = sqrt(df) tan(angle), the density is a power of the cosine, which is summed up numerically.
    """
    df = min(df, _LARGEST_DF)
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (df - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(df) * np.tan(np.interp(LEVEL * below[-1], below, angles)))


def _two_way(values_mn: Floats) -> tuple[float, float, float]:
    """Return mean, variance of the mean and degrees of freedom, for random rows and random columns."""
    m, n = values_mn.shape
    mean = float(values_mn.mean())
    rows, columns = values_mn.mean(1) - mean, values_mn.mean(0) - mean
    of_rows, of_columns = n * float(rows @ rows) / (m - 1), m * float(columns @ columns) / max(1, n - 1)
    rest = float(((values_mn - mean) ** 2).sum()) - n * float(rows @ rows) - m * float(columns @ columns)
    of_images = max(0.0, of_columns - max(0.0, rest) / max(1, (m - 1) * (n - 1)))
    total = of_rows + of_images
    df = (m - 1) * (total / of_rows) ** 2 if of_rows > 0 else _LARGEST_DF
    return mean, total / (m * n), df


def _symmetric(value: float, half: float, least: float = -1.0) -> Interval:
    """Return an interval around a value, within what an accuracy (`least` 0) or a difference of two can be: that of two
    seeds often reaches beyond."""
    return Interval(value, max(value - half, least), min(value + half, 1.0))


def _ratio(gain: float, gap: float, covariances: Floats, t: float) -> Interval | None:
    """Return gain / gap with Fieller's interval: every r for which gain - r gap is at most t of its deviations from 0.
    None unless the gap is more than that above 0, since the interval has no end then."""
    (of_gain, both), (_, of_gap) = covariances.tolist()
    a, b, c = gap**2 - t * t * of_gap, gain * gap - t * t * both, gain**2 - t * t * of_gain
    if gap <= 0 or a <= 0:
        return None
    root = max(0.0, b * b - a * c) ** 0.5
    return _around(gain / gap, (b - root) / a, (b + root) / a)


def _percentiles(value: float, found_R: Floats) -> Interval:
    low, high = np.quantile(found_R, _TAILS)
    return _around(value, float(low), float(high))


def _around(value: float, low: float, high: float) -> Interval:
    """Return an interval that holds its own figure, also where that is at the end of what is possible."""
    return Interval(float(value), float(min(value, low)), float(max(value, high)))


def _ratios(numerators_R: Floats, denominators_R: Floats) -> tuple[float, float]:
    """Return the least and the largest r for which neither tail of numerator - r denominator is certain.

    A resample with a positive denominator is above 0 for r below its own ratio, one with a negative denominator for r
    above it: the share of resamples above 0 is a sum of steps over the sorted ratios.
    """
    ratios_R = numerators_R / denominators_R
    order = np.argsort(ratios_R)
    ratios_R, positive_R = ratios_R[order], denominators_R[order] > 0
    share_R = (positive_R.sum() + np.cumsum(np.where(positive_R, -1, 1))) / len(order)
    low, high = np.flatnonzero(share_R < _TAILS[1]), np.flatnonzero(share_R > _TAILS[0])
    return float(ratios_R[low[0]]), float(ratios_R[high[-1] + 1 if len(high) and high[-1] + 1 < len(order) else -1])
