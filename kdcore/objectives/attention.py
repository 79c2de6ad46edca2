"""Attention transfer: match the places of the image at which student and teacher are active.

Zagoruyko & Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks
via Attention Transfer", ICLR 2017, arXiv:1612.03928; sections 3.1 (activations) and 3.2 (gradients).

    F(A)           sum    Σ_c |A_c|        sum_p    Σ_c |A_c|^p        max_p    max_c |A_c|^p          H × W
    Q              F(A) as a vector of length 1, for each sample
    mean_squares   mean over N and HW of (Q_s - Q_t)²                    the authors' code; its beta is 1000
    norms          1/2 · 1/N Σ_n ‖Q_s - Q_t‖₂                            eq. 2; the paper's norm is the 2-norm
    L              summed over the pairs of layers

    J              gradient of a sample's cross-entropy at its image     eq. 3
    L              1/2 · 1/N Σ_n ‖J_s - J_t‖²                            eq. 4, squared as in its derivative (eq. 5)

The authors published code for activations, not for gradients. It raises A to p without |·| and takes the mean over
channels, which gives the same Q for an even p. If the maps differ in size, the larger one is averaged down first. A map
of zeros has Q = 0 and gets no gradient. A map of one place has Q = 1 for every image and gets no gradient either.

J is the gradient of the batch's *summed* cross-entropy at the normalised images, so that 1/N is applied once. Networks
with different normalisations measure J in different units. Batch norm in training mode mixes the samples: each J_n of
the student depends on the whole batch, each J_n of the frozen teacher does not. The student is differentiated twice,
which about doubles the cost of a step. The J of a ReLU network is a product of weights and 0-1 masks; only the weights
learn, because the masks have no gradient.
Shapes: N batch, C channels, P = H · W places.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kdcore.lesson import Lesson, Needs, Reduced, equal_shapes
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import averaged_to, input_gradients, maps, smaller_size, unit
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
    """Distance between the attention maps of two layers. Returns a scalar ≥ 0. Widths may differ."""
    size, attention = smaller_size(student_NCHW, teacher_NCHW), partial(attention_map, mapping=mapping, p=p)
    student_NP, teacher_NP = (attention(averaged_to(side, size)) for side in (student_NCHW, teacher_NCHW.detach()))
    return map_distance(student_NP, teacher_NP, reduction=reduction)


def map_distance(student_NP: Tensor, teacher_NP: Tensor, *, reduction: Reduction) -> Tensor:
    """Distance between attention maps: a scalar ≥ 0."""
    student_NP, teacher_NP = equal_shapes("maps of attention", student_NP, teacher_NP)
    difference_NP = student_NP - teacher_NP
    if reduction == "mean_squares":
        return difference_NP.square().mean()
    distance_N: Tensor = vector_norm(difference_NP, dim=1)
    return distance_N.mean() / 2


def attention_map(maps_NCHW: Tensor, *, mapping: Mapping, p: float) -> Tensor:
    """Return the map of activity over all channels: N × P, rows of length 1."""
    strength_NCHW = maps_NCHW.abs()
    # Q does not depend on the scale of A. Unscaled, the squares of |A|^8 overflow float32 where |A| is a few hundred.
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
    """Half of the squared distance between the gradients at an image, averaged over the batch: a scalar ≥ 0."""
    return (student_NCHW - teacher_NCHW.detach()).square().flatten(1).sum(1).mean() / 2


class AttentionTransfer(Objective):
    """Objective on activations: the sum of the losses at all pairs of taps. A teacher's maps are all it needs."""

    def __init__(self, options: Attention, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None, "resolve() names the layers"
        assert options.mapping != "gradient", "a gradient is GradientAttention's"
        self.taps = options.taps
        self.map = partial(attention_map, mapping=options.mapping, p=options.p)
        self.reduction = options.reduction
        self.needs = Needs.at(self.taps)

    def build(self, lesson: Lesson) -> None:
        """Check that every tap is a map. This objective has no parameters."""
        self.sizes = [smaller_size(*pair) for pair in maps(lesson, self.taps)]
        # From here on a teacher may send its maps of attention alone.
        self.teacher_maps = [
            Reduced(
                (pair.teacher,), f"attention {self.map.keywords} at {size}", partial(_attention, size=size, of=self.map)
            )
            for pair, size in zip(self.taps, self.sizes, strict=True)
        ]
        self.needs = Needs(tuple(pair.student for pair in self.taps), reduced=tuple(self.teacher_maps))

    def forward(self, lesson: Lesson) -> Tensor:
        return torch.stack(
            [
                map_distance(
                    _attention(lesson.student.taps[pair.student], size=size, of=self.map),
                    teacher.read(lesson.teacher),
                    reduction=self.reduction,
                )
                for pair, size, teacher in zip(self.taps, self.sizes, self.teacher_maps, strict=True)
            ]
        ).sum()


def _attention(maps_NCHW: Tensor, size: tuple[int, ...], of: Callable[[Tensor], Tensor]) -> Tensor:
    return of(averaged_to(maps_NCHW, size))


class GradientAttention(Objective):
    """Objective on gradients: compares how the cross-entropies of student and teacher depend on each pixel."""

    needs = Needs(input_gradient=True)

    def __init__(self, options: Attention, setting: Setting) -> None:
        super().__init__()

    def forward(self, lesson: Lesson) -> Tensor:
        return gradient_attention_loss(*input_gradients(lesson))


def from_options(options: Attention, setting: Setting) -> Objective:
    return (GradientAttention if options.compares_gradients else AttentionTransfer)(options, setting)
