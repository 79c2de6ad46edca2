"""What the labels teach: cross-entropy, hard or soft, smoothed or not.

    L = -1/N Σ_n Σ_k y_nk · log softmax(z_n)_k          y = (1 - s) · label + s / K

Label smoothing s: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, arXiv:1512.00567.
Shapes: N batch, K classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

UNKNOWN = -1
"""The label of an image whose class nobody knows."""


def label_loss(logits_NK: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean over the batch; `labels` are int64 N, or float N × K where images were mixed.

    Rows of label -1 are left out of sum and count; a batch of nothing else costs 0.
    """
    if labels.is_floating_point():
        return cross_entropy(logits_NK, labels, label_smoothing=smoothing)
    total = cross_entropy(logits_NK, labels, label_smoothing=smoothing, ignore_index=UNKNOWN, reduction="sum")
    return total / known(labels)


def known(labels: Tensor) -> Tensor:
    """How many labels of a batch are known, and 1 where none is: a tensor, so that no host waits."""
    if labels.is_floating_point():
        return labels.new_tensor(len(labels))
    return (labels != UNKNOWN).sum().clamp(min=1)


def hits(logits_NK: Tensor, labels: Tensor) -> Tensor:
    """How many of the batch are right (of mixed labels, the heavier one counts): a tensor, so that no host waits."""
    hard_N = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits_NK.argmax(1) == hard_N).sum(dtype=torch.float32)
