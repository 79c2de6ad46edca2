"""Activation boundaries: the student learns which of the teacher's neurons are active, before it learns labels.

Heo, Lee, Yun & Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
2019, arXiv:1811.03233. The share of neurons that differ has no gradient. The loss that replaces it is a squared hinge
with a margin m on the teacher's side of the boundary. s and t are activations before their ReLU:

    distance = share of neurons with [s > 0] ≠ [t > 0]                    reported, not minimised
    loss     = 1/N Σ_chw,n  (s + m)² where t ≤ 0 and s > -m,
                            (s - m)² where t > 0 and s ≤ m,  else 0       m = 1

    L = 3/1000 · Σ_i 2^(i-L+1) · loss_i        taps i = 0 … L-1, shallow to deep; the deepest has weight 1

If student and teacher have different numbers of channels, s is connector(student's map): a 1x1 convolution and a batch
norm. If the numbers are equal, the maps are compared as they are. The weights, the connector, the rule when it is left
out, and 3/1000 are those of the authors' code for CIFAR; CRD's code (RepDistiller) has the same. 3/1000 is part of the
loss, so beta is 1: in a stage that minimises nothing else it only scales the step.
CRD's code connects maps of different sizes by a strided convolution; here the larger map is averaged down first.
A loss of 0 means that every neuron is beyond the margin on the teacher's side. The maps may still differ.

Two stages: first this loss alone, then the labels alone (the authors' code: kd alone).
Shapes: N batch, C channels of the teacher, H×W places.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting, TwoStages
from kdcore.objectives.pairs import connector, maps, same_size
from kdcore.spec.methods import features

SCALE = 3 / 1000


def boundary_loss(student_NCHW: Tensor, teacher_NCHW: Tensor, *, margin: float = 1.0) -> Tensor:
    """Squared distance of each neuron from the margin on the teacher's side of the boundary.

    Summed over channels and places, averaged over the batch. Returns a scalar ≥ 0.
    """
    missing_NCHW = torch.where(teacher_NCHW > 0, relu(margin - student_NCHW), relu(student_NCHW + margin))
    return missing_NCHW.square().sum() / len(student_NCHW)


def boundary_distance(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Share of the neurons that are active in only one of the maps: a scalar in [0, 1] without gradient."""
    return ((student_NCHW > 0) != (teacher_NCHW > 0)).to(student_NCHW.dtype).mean()


class ActivationBoundaries(Objective):
    """Objective of the first stage: the boundary loss at each pair of taps, weighted and summed."""

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
        weighted = [loss * 2.0 ** (i - len(losses) + 1) for i, loss in enumerate(losses)]
        return SCALE * torch.stack(weighted).sum()


def from_options(options: features.ActivationBoundary, setting: Setting) -> TwoStages:
    """Two stages: the boundaries alone train the student, then the labels alone."""
    return TwoStages(first=ActivationBoundaries(options, setting), then=None)
