"""Whether a model's probabilities are the shares in which it is right, and the temperature that makes them so.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv:1706.04599.

Shapes: n images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from base.wire import Calibration, ReliabilityBin

BINS = 15
"""Bins of equal width, as in the paper."""
COLDEST, HOTTEST = 0.05, 20.0
"""Between these a temperature is looked for."""
PRECISION = 1e-4
"""To which the logarithm of a temperature is found."""
AT_BOUND = 0.01
"""A minimum that is so near to a bound, in the logarithm of the temperature, is none."""
ROWS = 8192
"""Rows that are computed at a time in float64, so that many classes need little memory."""
GOLDEN = (math.sqrt(5) - 1) / 2


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a tensor, ROWS at a time."""
    for at in range(0, len(tensor), ROWS):
        yield tensor[at : at + ROWS]


def confidences(logits_nK: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the largest probability of each image, float64 n, of the logits divided by a temperature."""
    return torch.cat([(part.double() / temperature).softmax(1).amax(1) for part in parts(logits_nK)])


def reliability(confidence_n: Tensor, right_n: Tensor) -> list[ReliabilityBin]:
    """Return the bins of a reliability diagram: each has its upper bound, the first one 0, too."""
    place_n = (confidence_n * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    images = torch.bincount(place_n, minlength=BINS).tolist()
    confidence, accuracy = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, place_n, values.double()).tolist()
        for values in (confidence_n, right_n)
    )
    return [
        ReliabilityBin(
            images=count,
            confidence=sum_of_confidence / count if count else None,
            accuracy=right / count if count else None,
        )
        for count, sum_of_confidence, right in zip(images, confidence, accuracy, strict=True)
    ]


def ece(bins: Sequence[ReliabilityBin]) -> float:
    """Return the expected calibration error: Σ_b n_b / n · |accuracy_b - confidence_b|."""
    filled = [
        (one["images"], one["accuracy"], one["confidence"])
        for one in bins
        if one["accuracy"] is not None and one["confidence"] is not None
    ]
    return sum(count * abs(accuracy - confidence) for count, accuracy, confidence in filled) / sum(
        count for count, _, _ in filled
    )


def fitted_temperature(logits_nK: Tensor, labels_n: Tensor) -> float | None:
    """Return the temperature T that minimises the cross-entropy of softmax(z / T), by golden sections of log T.

    The cross-entropy is convex in 1 / T, so that it has one minimum. None if that is not between COLDEST and HOTTEST:
    of a model that is right on all of the images there is none, and of one that knows nothing it is infinite.
    """

    def loss(log_t: float) -> float:
        sums = [
            cross_entropy(part.double() / math.exp(log_t), labels, reduction="sum")
            for part, labels in zip(parts(logits_nK), parts(labels_n), strict=True)
        ]
        return torch.stack(sums).sum().item() / len(labels_n)

    lowest, highest = low, high = math.log(COLDEST), math.log(HOTTEST)
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > PRECISION:
        if at_left <= at_right:  # Of equal ones the colder: where all are right, the loss is 0 over a wide range.
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = loss(right)
    found = (low + high) / 2
    is_inside = lowest + AT_BOUND < found < highest - AT_BOUND and math.isfinite(at_left)
    return math.exp(found) if is_inside else None


def calibration(test_nK: Tensor, labels_n: Tensor, temperature: float | None) -> Calibration:
    """Return a model's calibration on test images, before and after a temperature that was fitted on others."""
    right_n = test_nK.argmax(1) == labels_n
    before = reliability(confidences(test_nK), right_n)
    after = None if temperature is None else reliability(confidences(test_nK, temperature), right_n)
    return Calibration(
        ece=ece(before),
        reliability=before,
        temperature=temperature,
        ece_after=None if after is None else ece(after),
        reliability_after=after,
    )
