"""Set a part of some labelled samples aside, class by class, the same part every time."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcore.data import counters
from kdcore.data.resident import Images

Labels = npt.NDArray[np.int64]


def split(images: Images, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on, both rising; see `set_aside`.

    Rows without a label (-1) stay in training: nothing can be measured on them.
    """
    labels = images.labels.cpu().numpy()
    labelled = np.flatnonzero(labels >= 0)
    aside = np.zeros(len(labels), dtype=np.bool_)
    aside[labelled] = set_aside(labels[labelled], fraction, seed)
    return torch.from_numpy(np.flatnonzero(~aside)), torch.from_numpy(np.flatnonzero(aside))


def set_aside(labels: Labels, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """True for the rows that are set aside: `fraction` of all, rounded, at least one, each class in proportion.

    A class never loses its last sample. A fraction of 0 sets nothing aside.
    """
    aside = np.zeros(len(labels), dtype=np.bool_)
    if fraction <= 0:
        return aside
    states = counters.streams(counters.key(seed), torch.arange(len(labels)))
    shuffled = torch.argsort(counters.draws(states, 1)[0], stable=True).numpy()
    quotas = _quotas(np.bincount(labels), fraction)
    for label in np.flatnonzero(quotas):
        of_class = shuffled[labels[shuffled] == label]
        aside[of_class[: quotas[label]]] = True
    return aside


def _quotas(counts: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.int64]:
    """How many of each class: the whole part of its share, then one more where the remainder is largest."""
    shares = counts * fraction
    quotas = shares.astype(np.int64)
    wanted = max(1, round(float(counts.sum()) * fraction))
    most = np.maximum(counts - 1, 0)
    for label in np.argsort(quotas - shares, kind="stable")[: max(0, wanted - int(quotas.sum()))]:
        quotas[label] += 1
    capped: npt.NDArray[np.int64] = np.minimum(quotas, most)
    return capped
