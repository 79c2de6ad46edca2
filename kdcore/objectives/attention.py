"""Attention transfer: the student looks where the teacher looks.

Zagoruyko & Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer", ICLR 2017, arXiv:1612.03928; sections 3.1 (activations) and 3.2 (gradients).

    F(A)           sum    Σ_c |A_c|        sum_p    Σ_c |A_c|^p        max_p    max_c |A_c|^p          H × W
    Q              F(A) as a vector of length 1, for each sample
    mean_squares   mean over N and HW of (Q_s - Q_t)²                    the authors' code; its beta is 1000
    norms          1/2 · 1/N Σ_n ‖Q_s - Q_t‖₂                            eq. 2, whose norm is the 2-norm in the paper
    L              summed over the pairs of layers

    J              gradient of a sample's cross-entropy at its image     eq. 3
    L              1/2 · 1/N Σ_n ‖J_s - J_t‖²                            eq. 4, squared as its derivative (eq. 5) has it

Code for activations is published (for gradients it never was). It raises A to p without |·| and takes the mean over
channels: the same Q for the even p that it is used with. Where sizes differ the larger map is averaged down first. A
map of zeros has Q = 0 and gets no gradient; one of a single place has Q = 1 whatever it sees, and teaches nothing.

J is what autograd gives for the batch's *summed* cross-entropy at the normalised images, so that 1/N is not in it
twice; networks that normalise differently measure it in different units. Batch norm in training mode mixes the samples:
a student's J_n then sees the whole batch, the frozen teacher's never does. The student is differentiated twice, at
about double the cost of a step. The J of a ReLU network is a product of weights and 0-1 masks; it learns through the
weights, as the masks have no gradient.
Shapes: N batch, C channels, P = H · W places.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.tapped import maps, same_size, unit
from kdcore.spec.methods.features import Attention

Mapping = Literal["sum", "sum_p", "max_p"]
Reduction = Literal["mean_squares", "norms"]


def attention_loss(
    student_NCHW: Tensor,
    teacher_NCHW: Tensor,
    *,
    mapping: Mapping = "sum_p",
    p: float = 2.0,
    reduction: Reduction = "mean_squares",
) -> Tensor:
    """Distance of two layers' attention maps, a scalar ≥ 0. Widths may differ."""
    student_NCHW, teacher_NCHW = same_size(student_NCHW, teacher_NCHW.detach())
    attention = partial(attention_map, mapping=mapping, p=p)
    difference_NP = attention(student_NCHW) - attention(teacher_NCHW)
    if reduction == "mean_squares":
        return difference_NP.square().mean()
    distance_N: Tensor = vector_norm(difference_NP, dim=1)
    return distance_N.mean() / 2


def attention_map(maps_NCHW: Tensor, *, mapping: Mapping, p: float) -> Tensor:
    """Where the channels fire, N × P, rows of unit length."""
    strength_NCHW = maps_NCHW.abs()
    # Q does not know A's scale, and |A|^8 would leave float32 where |A| is in the hundreds: so it is 1 at most.
    largest_N111 = strength_NCHW.detach().amax(dim=(1, 2, 3), keepdim=True)
    strength_NCHW = strength_NCHW / largest_N111.clamp_min(1e-12)
    if mapping == "sum":
        attention_NHW = strength_NCHW.sum(1)
    elif mapping == "sum_p":
        attention_NHW = strength_NCHW.pow(p).sum(1)
    else:
        attention_NHW = strength_NCHW.amax(1).pow(p)
    return unit(attention_NHW.flatten(1), dim=1)


def gradient_attention_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Half of the squared distance between the gradients at the images, averaged over them: a scalar ≥ 0."""
    return (student_NCHW - teacher_NCHW.detach()).square().flatten(1).sum(1).mean() / 2


class AttentionTransfer(Objective):
    """The objective on activations: compares each pair of taps and sums."""

    def __init__(self, options: Attention, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None, "resolve() names the layers"
        assert options.mapping != "gradient", "a gradient is GradientAttention's"
        self.taps = options.taps
        self.mapping: Mapping = options.mapping
        self.p = options.p
        self.reduction = options.reduction
        self.needs = Needs.at(self.taps)

    def build(self, lesson: Lesson) -> None:
        """Owns nothing, but refuses what is no map."""
        maps(lesson, self.taps)

    def forward(self, lesson: Lesson) -> Tensor:
        return torch.stack(
            [
                attention_loss(student, teacher, mapping=self.mapping, p=self.p, reduction=self.reduction)
                for student, teacher in maps(lesson, self.taps)
            ]
        ).sum()


class GradientAttention(Objective):
    """The objective on gradients: where a changed pixel would change the loss of student and teacher."""

    needs = Needs(input_gradient=True)

    def __init__(self, options: Attention, setting: Setting) -> None:
        super().__init__()

    def forward(self, lesson: Lesson) -> Tensor:
        student, teacher = lesson.student.input_gradient, lesson.teacher.input_gradient
        assert student is not None and teacher is not None, "a scheme takes the gradients that are asked for"
        return gradient_attention_loss(student, teacher)


def from_options(options: Attention, setting: Setting) -> Objective:
    return (GradientAttention if options.compares_gradients else AttentionTransfer)(options, setting)
