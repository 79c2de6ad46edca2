"""Mix the images of a batch in pairs, and their labels with them: mixup and cutmix.

Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv:1710.09412.
Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
arXiv:1905.04899.

    λ ~ Beta(α, α), one for a batch      x̃ = λ·x + (1 - λ)·x'      ỹ = λ·y + (1 - λ)·y'

In cutmix a box of x', of area 1 - λ before the image's edge clips it, covers x, and λ becomes the uncovered part.
Each image's partner is the next one in a circle of hashed order, so no image is its own partner. It depends on the rows
of the batch, not on their order. The authors' code draws a permutation that may leave some images unmixed.

Shapes: N batch, C channels, H × W places, K classes.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kdcore.data import counter_rng

QUANTILES = 4096


def mixup(
    views: Sequence[Tensor], labels_NK: Tensor, states_N: Tensor, quantiles: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Blend each image with its partner's; float32 in 0..255, and soft labels. `views`: the images at each size."""
    partner_N, common = partners(states_N)
    share = _drawn(quantiles, counter_rng.draws(common, 1)[0])
    mixed = [_blend(pixels, pixels[partner_N], share) for pixels in map(Tensor.float, views)]
    return mixed, _blend(labels_NK, labels_NK[partner_N], share)


def cutmix(
    views: Sequence[Tensor], labels_NK: Tensor, states_N: Tensor, quantiles: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Cover one box, the same in the whole batch, with the partner's pixels; float32 in 0..255, and soft labels.

    `views`: the same images at each size. The first one's box defines the labels; the others' are it to the pixel.
    """
    partner_N, common = partners(states_N)
    height, width = views[0].shape[2:]
    which, middle_row, middle_column = counter_rng.draws(common, 3)
    side = (1 - _drawn(quantiles, which)).sqrt()
    rows, columns = _span(middle_row, side, height), _span(middle_column, side, width)
    inside_HW = _inside(rows, height, height)[:, None] & _inside(columns, width, width)
    share = 1 - inside_HW.double().mean()
    mixed = []
    for pixels in views:
        tall, wide = pixels.shape[2:]
        covered_HW = _inside(rows, height, tall)[:, None] & _inside(columns, width, wide)
        mixed.append(torch.where(covered_HW, pixels[partner_N], pixels).float())
    return mixed, _blend(labels_NK, labels_NK[partner_N], share)


def _drawn(quantiles: Tensor, bits: Tensor) -> Tensor:
    """Return the quantile that some random bits choose: scalars, but no number that the host waits for."""
    return quantiles.index_select(0, counter_rng.below(bits, QUANTILES).view(1)).squeeze(0)


def partners(states_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's partner in the batch, and one state for the draws of the whole batch."""
    hashed = counter_rng.draws(states_N, 1)[0]
    circle = torch.argsort(hashed, stable=True)
    partner = torch.empty_like(circle)
    partner[circle] = circle.roll(1)
    return partner, hashed.sum()


@cache
def beta_quantiles(alpha: float) -> Tensor:
    """Return λ at `QUANTILES` evenly spaced probabilities: a random one of them is a draw from Beta(α, α).

    For α < 1 the density λ^(α-1)·(1-λ)^(α-1) has a pole at 0, which u = λ^α removes. The upper half is mirrored.
    """
    power = min(alpha, 1.0)
    u = np.linspace(0, 0.5**power, 20_001)
    density = u ** (alpha / power - 1) * (1 - u ** (1 / power)) ** (alpha - 1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    probability = (np.arange(QUANTILES // 2) + 0.5) / QUANTILES
    lower = np.interp(probability, cumulative / cumulative[-1] / 2, u) ** (1 / power)
    return torch.from_numpy(np.concatenate([lower, 1 - lower[::-1]]))


def _span(bits: Tensor, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the first place that a box covers in one dimension, and the first after it: length `side` of 1, with a
    random middle. They may be outside of the image."""
    length = (size * side).long()
    first = counter_rng.below(bits, size) - length // 2
    return first, first + length


def _inside(span: tuple[Tensor, Tensor], of: int, size: int) -> Tensor:
    """Return True for the places of one dimension that a span covers, which is given in places of another size."""
    first, end = ((2 * place * size + of) // (2 * of) for place in span)
    place = torch.arange(size, device=first.device)
    return (place >= first) & (place < end)


def _blend(own: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return other.lerp(own, share.to(own.dtype))
