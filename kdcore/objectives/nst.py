"""Neuron selectivity transfer: match the distribution of the channels' activation patterns.

Huang & Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv:1707.01219,
section 4: the squared maximum mean discrepancy (MMD²) between two sets of vectors.

    x_i, y_j     student's and teacher's channels, flattened over their places, at length 1
    L = mean_ij k(y_i, y_j) + mean_ij k(x_i, x_j) - 2 mean_ij k(x_i, y_j)            averaged over the batch
    linear       x·y
    polynomial   (x·y)²                         (x·y + c)^d with d = 2, c = 0
    gaussian     exp(-‖x - y‖² / 2σ²)           σ² = mean_ij ‖x_i - y_j‖² of the sample

The code with which numbers were published (RepDistiller, beta 50) has the polynomial kernel alone and agrees. The paper
takes the mean squared distance of the pairs for σ²; here the pairs are the student's channels with the teacher's, and
σ² is a constant to the gradient. σ² is at least 1e-4: below that, float32 compares mostly rounding errors.

The teacher's own term is constant but is included, so that L ≥ 0 up to rounding. Widths may differ. If the maps differ
in size, the larger one is averaged down first. A channel of zeros is a vector of length 0 and gets no gradient.
Shapes: N batch, C and D channels of student and teacher, P = H · W places.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import maps, same_size, unit
from kdcore.spec.methods.features import Nst

Kernel = Literal["linear", "polynomial", "gaussian"]


def nst_loss(student_NCHW: Tensor, teacher_NCHW: Tensor, *, kernel: Kernel = "polynomial") -> Tensor:
    """MMD² between the channels of two layers. Returns a scalar ≥ 0 up to rounding."""
    student_NCHW, teacher_NCHW = same_size(student_NCHW, teacher_NCHW.detach())
    student_NCP, teacher_NDP = unit(student_NCHW.flatten(2), dim=2), unit(teacher_NCHW.flatten(2), dim=2)
    mean: Callable[[Tensor, Tensor], Tensor]
    if kernel == "linear":
        mean = _mean_linear
    elif kernel == "polynomial":
        mean = _mean_polynomial
    else:
        variance_N = _squared_distances(student_NCP, teacher_NDP).detach().mean((1, 2))
        mean = partial(_mean_gaussian, variance_N=variance_N.clamp_min(1e-4))
    of_teacher_N, of_student_N = mean(teacher_NDP, teacher_NDP), mean(student_NCP, student_NCP)
    return (of_teacher_N + of_student_N - 2 * mean(student_NCP, teacher_NDP)).mean()


def _mean_linear(x_NCP: Tensor, y_NDP: Tensor) -> Tensor:
    """Mean of x_i·y_j: the product of the two means."""
    return (x_NCP.mean(1) * y_NDP.mean(1)).sum(1)


def _mean_polynomial(x_NCP: Tensor, y_NDP: Tensor) -> Tensor:
    """Mean of (x_i·y_j)². Σ_ij (x_i·y_j)² = Σ_pq (XᵀX)_pq (YᵀY)_pq: the smaller of C × D and P × P is computed."""
    (_, width, places), other = x_NCP.shape, y_NDP.shape[1]
    if places * places < width * other:
        return ((x_NCP.mT @ x_NCP) * (y_NDP.mT @ y_NDP)).sum((1, 2)) / (width * other)
    return (x_NCP @ y_NDP.mT).square().mean((1, 2))


def _mean_gaussian(x_NCP: Tensor, y_NDP: Tensor, *, variance_N: Tensor) -> Tensor:
    """Mean of exp(-‖x_i - y_j‖² / 2σ²)."""
    return torch.exp(-_squared_distances(x_NCP, y_NDP) / (2 * variance_N[:, None, None])).mean((1, 2))


def _squared_distances(x_NCP: Tensor, y_NDP: Tensor) -> Tensor:
    """‖x_i - y_j‖² of all pairs, N × C × D. The lengths are 1, or 0 for a channel of zeros."""
    x_NC1, y_N1D = x_NCP.square().sum(2)[:, :, None], y_NDP.square().sum(2)[:, None, :]
    return x_NC1 + y_N1D - 2 * (x_NCP @ y_NDP.mT)


class NeuronSelectivityTransfer(Objective):
    """Objective that compares the channels at each pair of taps and sums."""

    def __init__(self, options: Nst, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None, "resolve() names the layers"
        self.taps = options.taps
        self.kernel = options.kernel
        self.needs = Needs.at(self.taps)

    def build(self, lesson: Lesson) -> None:
        """Check that every tap is a map. This objective has no parameters."""
        maps(lesson, self.taps)

    def forward(self, lesson: Lesson) -> Tensor:
        losses = [nst_loss(student, teacher, kernel=self.kernel) for student, teacher in maps(lesson, self.taps)]
        return torch.stack(losses).sum()
