"""Coverage of a report's intervals, in a simulation in which the true figures are known.

    python -m bench.intervals [--rounds 2000]

Three models answer n images, each right with a known probability; what they have in common is a difficulty of the image
(a Gaussian copula). Then gain and gap closed are known, and each round asks whether its 95 % intervals hold them. For
seeds, each seed adds an offset of its own to both models' accuracies, and draws its own noise. Prints a line a setting:
the coverage of the gain, how often a gap closed was stated, its coverage where it was, and the coverage if a refusal
counts as right (that is what 95 % is promised for where the teacher's gap is small and mostly refused).

`tests/bench/test_intervals.py` asserts a quick version. 1,000 rounds have a standard error of 0.7 points.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from kdcore.measure import intervals

NORMAL = NormalDist()
GRID = 2001


@dataclass(frozen=True)
class Setting:
    """Three models on n images: the true accuracies, and how far they find the same images difficult (0 to 1)."""

    images: int
    student: float
    alone: float
    teacher: float
    common: float = 0.7

    @property
    def gain(self) -> float:
        return self.student - self.alone

    @property
    def teacher_gap(self) -> float:
        return self.teacher - self.alone

    def __str__(self) -> str:
        accuracies = " / ".join(f"{100 * one:g}" for one in (self.student, self.alone, self.teacher))
        return f"{self.images} images, {accuracies} %"

    def combinations(self) -> NDArray[np.float64]:
        """Return the probability of each combination of `intervals.of_counts`, exactly but for the integral over
        difficulties."""
        levels = np.array([NORMAL.inv_cdf((one + 0.5) / GRID) for one in range(GRID)])
        right = []
        for accuracy in (self.student, self.alone, self.teacher):
            threshold = NORMAL.inv_cdf(accuracy) - self.common**0.5 * levels
            chances = np.array([NORMAL.cdf(one) for one in threshold / (1 - self.common) ** 0.5])
            right.append(chances * accuracy / chances.mean())  # The grid's own error, taken out.
        cells = [
            np.prod([one if cell >> place & 1 else 1 - one for place, one in enumerate(right)], axis=0).mean()
            for cell in range(8)
        ]
        return np.array(cells) / sum(cells)


SETTINGS = tuple(
    Setting(images, alone + gain, alone, alone + gap)
    for images in (200, 1000, 10_000)
    for alone, gain, gap in (
        (0.70, 0.00, 0.10),
        (0.70, 0.05, 0.10),
        (0.70, 0.10, 0.10),
        (0.70, -0.05, 0.10),
        (0.70, 0.02, 0.03),
        (0.93, 0.02, 0.04),
        (0.50, 0.15, 0.30),
        (0.70, 0.03, 0.00),
    )
)
"""Gains of nothing, of a half and of the whole gap, and harm; gaps that can be seen, small ones, and none."""


@dataclass
class Coverage:
    """Shares of all rounds."""

    gain: float
    stated: float
    """Rounds in which a gap closed was stated."""
    gap_closed: float | None
    """Of these, how many hold the true one; None if there are none, or none is true."""
    gap_or_refusal: float


def coverage(setting: Setting, rounds: int, resamples: int, seed: int = 0) -> Coverage:
    """Return how often the intervals over images hold the true figures."""
    generator = np.random.default_rng(seed)
    chances, truth = setting.combinations(), setting.gain / setting.teacher_gap if setting.teacher_gap else None
    gains = stated = holding = 0
    for counts in generator.multinomial(setting.images, chances, size=rounds):
        found = intervals.of_counts(counts, resamples)
        gains += found.gain.low <= setting.gain <= found.gain.high
        if found.gap_closed is not None:
            stated += 1
            holding += truth is not None and found.gap_closed.low <= truth <= found.gap_closed.high
    return Coverage(
        gains / rounds,
        stated / rounds,
        holding / stated if stated and truth is not None else None,
        (holding + rounds - stated) / rounds,
    )


def seeds_coverage(
    setting: Setting, seeds: int, rounds: int, spread: float = 0.01, seed: int = 0
) -> tuple[Coverage, Coverage]:
    """Return the coverage of the intervals over seeds, first for the same images, then for other images, too.

    `spread`: the standard deviation, over seeds, of each model's true accuracy. On the same images, the true mean is
    that of the images that were drawn.
    """
    generator = np.random.default_rng(seed)
    found = np.zeros((2, 3))
    truth = setting.gain / setting.teacher_gap
    for _ in range(rounds):
        level_n = setting.common**0.5 * generator.standard_normal(setting.images)

        def chances(accuracy: float, level_n: NDArray[np.float64] = level_n) -> NDArray[np.float64]:
            # Of many seeds: the seed's offset is on the scale of the threshold, as its noise is.
            slope = NORMAL.pdf(NORMAL.inv_cdf(accuracy))
            noise = ((1 - setting.common) + (spread / slope) ** 2) ** 0.5
            scale = (setting.common + noise**2) ** 0.5
            return np.array([NORMAL.cdf(one) for one in (NORMAL.inv_cdf(accuracy) * scale - level_n) / noise])

        def run(accuracy: float, level_n: NDArray[np.float64] = level_n) -> NDArray[np.bool_]:
            slope = NORMAL.pdf(NORMAL.inv_cdf(accuracy))
            offset_m = spread / slope * generator.standard_normal((seeds, 1))
            scale = (1 + (spread / slope) ** 2) ** 0.5
            noise = (1 - setting.common) ** 0.5 * generator.standard_normal((seeds, len(level_n)))
            right: NDArray[np.bool_] = level_n + noise + offset_m < NORMAL.inv_cdf(accuracy) * scale
            return right

        student, alone = run(setting.student), run(setting.alone)
        noise_n = (1 - setting.common) ** 0.5 * generator.standard_normal(setting.images)
        teacher = level_n + noise_n < NORMAL.inv_cdf(setting.teacher)
        here, there = float(chances(setting.student).mean()), float(chances(setting.alone).mean())
        true_here = (here - there, (here - there) / (float(teacher.mean()) - there))
        same = intervals.over_seeds(student.mean(1), alone.mean(1), student.shape[1], float(teacher.mean()))
        other = intervals.over_seeds_and_images(student, alone, teacher)
        for row, (gain, gap), true in ((0, same, true_here), (1, other, (setting.gain, truth))):
            found[row, 0] += gain.low <= true[0] <= gain.high
            found[row, 1] += gap is not None
            found[row, 2] += gap is not None and gap.low <= true[1] <= gap.high
    rows = []
    for gains, stated, holding in found.tolist():
        rows.append(
            Coverage(
                gains / rounds, stated / rounds, holding / stated if stated else None, 1 - (stated - holding) / rounds
            )
        )
    return rows[0], rows[1]


def table(rounds: int, resamples: int) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| setting (student / alone / teacher) | gain | gap stated | gap closed, where stated | right or refused |"
    yield "|---|---|---|---|---|"
    for setting in SETTINGS:
        yield _row(str(setting), coverage(setting, rounds, resamples))
    for seeds in (3, 5, 10):
        setting = Setting(1000, 0.75, 0.70, 0.80)
        same, other = seeds_coverage(setting, seeds, min(rounds, 1000))
        yield _row(f"{setting}, {seeds} seeds, the same images", same)
        yield _row(f"{setting}, {seeds} seeds, other images", other)


def _row(name: str, found: Coverage) -> str:
    figures = (found.gain, found.stated, found.gap_closed, found.gap_or_refusal)
    return f"| {name} | " + " | ".join("–" if one is None else f"{100 * one:.1f}" for one in figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000, help="draws of test images for each setting")
    parser.add_argument("--resamples", type=int, default=intervals.RESAMPLES, help="of the bootstrap")
    arguments = parser.parse_args()
    for line in table(arguments.rounds, arguments.resamples):
        print(line, flush=True)


if __name__ == "__main__":
    main()
