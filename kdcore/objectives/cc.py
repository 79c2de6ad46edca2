"""Correlation congruence: match how the embeddings of a batch vary together.

Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv:1904.01802. Two losses have this
name. Both compare linear embeddings e of student and teacher, `width` (128) wide:

    pairs      1/(N-1) Σ_{n<N} Σ_d δ_nd · δ_(n+1)d          δ = |e_student - e_teacher|, samples in the batch's order
    gaussian   1/N² Σ_ij (k(ê_i, ê_j) of the student - k(ê_i, ê_j) of the teacher)²                ê = e / ‖e‖
               k(x, y) = exp(-2γ) Σ_{p=0..P} (2γ)^p / p! · (x·y)^p            γ = 0.4, P = 2

`gaussian` is the paper's: the RBF kernel exp(-γ‖x - y‖²), approximated by the first P + 1 terms of its Taylor series.
The series approximates the kernel only for vectors of length 1, so embeddings are normalised first, as in public code
(Knowledge-Distillation-Zoo); γ and P are that code's too. `pairs` is what an author sent to CRD's authors for their
table, and beta 0.02 belongs to it: it multiplies the error of each sample by that of the next. The values of `gaussian`
are much smaller.

Both embeddings are trained with the student, as in CRD's code; the teacher itself gets no gradient. Neither loss
prevents the two embeddings from becoming equal by discarding information; as published. A batch of one has no pairs:
both forms give 0, unless one embedding is zero. N may be odd. An embedding of zeros gets no gradient from `gaussian`.
Shapes: N batch, D width.
"""

import math

import torch
from torch import Tensor, nn

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import embeddings, unit
from kdcore.spec.methods.relations import Cc


def cc_pairs_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean product of the errors of neighbouring samples. Returns a scalar ≥ 0. Both sides get a gradient."""
    error_ND = (student_ND - teacher_ND).abs()
    return (error_ND[:-1] * error_ND[1:]).sum() / max(len(error_ND) - 1, 1)


def cc_gaussian_loss(student_ND: Tensor, teacher_ND: Tensor, *, gamma: float = 0.4, order: int = 2) -> Tensor:
    """Mean squared difference of the kernel matrices. Returns a scalar ≥ 0. Both sides get a gradient."""
    student_NN, teacher_NN = (_kernel(side_ND, gamma, order) for side_ND in (student_ND, teacher_ND))
    return (student_NN - teacher_NN).square().mean()


def _kernel(embedding_ND: Tensor, gamma: float, order: int) -> Tensor:
    """The truncated RBF kernel of all pairs of samples, N × N."""
    direction_ND = unit(embedding_ND, dim=1)
    exponent_NN = 2 * gamma * (direction_ND @ direction_ND.T)
    series = sum((exponent_NN**p / math.factorial(p) for p in range(1, order + 1)), torch.ones_like(exponent_NN))
    return math.exp(-2 * gamma) * series


class CorrelationCongruence(Objective):
    """Objective that embeds both sides and compares them in one of the two forms."""

    def __init__(self, options: Cc, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the layers"
        self.options = options
        self.tap = options.tap
        self.needs = Needs.at([self.tap])

    def build(self, lesson: Lesson) -> None:
        student_ND, teacher_ND = embeddings(lesson, self.tap)
        self.student_embedding = nn.Linear(student_ND.shape[1], self.options.width).to(student_ND)
        self.teacher_embedding = nn.Linear(teacher_ND.shape[1], self.options.width).to(teacher_ND)

    def forward(self, lesson: Lesson) -> Tensor:
        student_ND, teacher_ND = embeddings(lesson, self.tap)
        student_ND, teacher_ND = self.student_embedding(student_ND), self.teacher_embedding(teacher_ND.detach())
        if self.options.form == "pairs":
            return cc_pairs_loss(student_ND, teacher_ND)
        return cc_gaussian_loss(student_ND, teacher_ND, gamma=self.options.gamma, order=self.options.order)
