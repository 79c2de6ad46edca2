"""What the labels teach: cross-entropy, hard or soft, smoothed or not.

    L = -1/N Σ_n Σ_k y_nk · log softmax(z_n)_k          y = (1 - s) · label + s / K

Label smoothing s: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, arXiv:1512.00567.
Shapes: N batch, K classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def label_loss(logits_NK: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean over the batch; `labels` are int64 N, or float N × K where images were mixed."""
    return cross_entropy(logits_NK, labels, label_smoothing=smoothing)


def hits(logits_NK: Tensor, labels: Tensor) -> Tensor:
    """How many of the batch are right (of mixed labels, the heavier one counts): a tensor, so that no host waits."""
    hard_N = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits_NK.argmax(1) == hard_N).sum(dtype=torch.float32)
