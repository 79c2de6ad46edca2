"""Activation boundaries: before it learns any label, the student learns which of the teacher's neurons fire.

Heo, Lee, Yun & Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
2019, arXiv:1811.03233. To fire alike is the aim, but that has no gradient; a squared hinge with a margin on the
teacher's side of the boundary has one. s and t are taken before their ReLU:

    distance = share of neurons with [s > 0] ≠ [t > 0]                    observed, never minimised
    loss     = 1/N Σ_chw,n  (s + m)² where t ≤ 0 and s > -m,
                            (s - m)² where t > 0 and s ≤ m,  else 0       m = 1

    L = 3/1000 · Σ_i 2^(i-L+1) · loss_i        taps i = 0 … L-1, shallow to deep: the deepest weighs 1

Where the student's map is not as wide as the teacher's, s is connector(student's map), a 1x1 convolution and a batch
norm; where it is, the neurons meet as they are. The weights, the connector, its absence and 3/1000 are the authors'
code for CIFAR, and CRD's (RepDistiller) has the same. 3/1000 is part of the loss, as there, so that beta is 1: it sets
the pace of a stage in which nothing else is minimised.
CRD's code connects maps of two sizes by a strided convolution; here both are averaged down to the smaller one first.
A loss of 0 means that every neuron is beyond the margin on the teacher's side, not that the maps agree.

Two stages: first this loss alone, then the labels alone (the authors' code: kd alone), without a trace of it.
Shapes: N batch, C channels of the teacher, H×W places.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting, TwoStages
from kdcore.objectives.tapped import connector, maps, same_size
from kdcore.spec.methods import features

SCALE = 3 / 1000


def boundary_loss(student_NCHW: Tensor, teacher_NCHW: Tensor, *, margin: float = 1.0) -> Tensor:
    """Squared way of each neuron to the teacher's side of the boundary and the margin beyond it, summed over channels
    and places and averaged over the batch: a scalar ≥ 0."""
    missing_NCHW = torch.where(teacher_NCHW > 0, relu(margin - student_NCHW), relu(student_NCHW + margin))
    return missing_NCHW.square().sum() / len(student_NCHW)


def boundary_distance(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Share of the neurons that fire in one map and not in the other: a scalar in [0, 1] without gradient."""
    return ((student_NCHW > 0) != (teacher_NCHW > 0)).to(student_NCHW.dtype).mean()


class ActivationBoundaries(Objective):
    """The objective of the first stage: at each pair of taps, the teacher's neurons fire in the student too."""

    def __init__(self, options: features.ActivationBoundary, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None, "resolve() names the taps"
        self.pairs = options.taps
        self.needs = Needs.at(self.pairs)
        self.margin = options.margin
        self.connectors = nn.ModuleList()

    def build(self, lesson: Lesson) -> None:
        self.connectors = nn.ModuleList(
            nn.Identity() if student.shape[1] == teacher.shape[1]
            else connector(student.shape[1], teacher.shape[1]).to(teacher)
            for student, teacher in maps(lesson, self.pairs)
        )  # fmt: skip

    def forward(self, lesson: Lesson) -> Tensor:
        losses, distances = [], []
        for connect, pair in zip(self.connectors, maps(lesson, self.pairs), strict=True):
            student_NCHW, teacher_NCHW = same_size(*pair)
            student_NCHW = connect(student_NCHW)
            losses.append(boundary_loss(student_NCHW, teacher_NCHW, margin=self.margin))
            distances.append(boundary_distance(student_NCHW, teacher_NCHW))
        self.observed["activation_boundary/differing"] = torch.stack(distances).mean()
        weighed = [loss * 2.0 ** (i - len(losses) + 1) for i, loss in enumerate(losses)]
        return SCALE * torch.stack(weighed).sum()


def from_options(options: features.ActivationBoundary, setting: Setting) -> TwoStages:
    """The boundaries first, the student trained by them alone; then the labels."""
    return TwoStages(first=ActivationBoundaries(options, setting), then=None)
