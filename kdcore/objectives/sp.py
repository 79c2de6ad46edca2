"""Similarity-preserving distillation: images that the teacher finds alike, the student should find alike.

Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682, section 3.1.

    F = a layer's activations, each image's laid in one row        N × D
    G = F · Fᵀ, each row divided by its length                     how alike each pair of the batch is
    L = ‖G_student - G_teacher‖²_F / N²

The code that numbers were published with (CRD's, beta 3000, checked by the authors) follows this formula. Widths and
sizes may differ: only N × N matrices meet. L depends on the batch, and a batch of one gives 0 unless a layer is dead.
A map of zeros is like none, itself included: its row and column are 0 and get no gradient.
Shapes: N batch, C channels, H × W places, D = C · H · W.
"""

from torch import Tensor

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.tapped import unit
from kdcore.spec.methods.relations import Sp


def sp_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean squared difference of the two similarity matrices, a scalar ≥ 0. What follows the batch may be any shape."""
    return (_similarities(student_NCHW) - _similarities(teacher_NCHW.detach())).square().mean()


def _similarities(activation_NCHW: Tensor) -> Tensor:
    """Inner products of all pairs, rows of unit length, N × N."""
    activation_ND = activation_NCHW.flatten(1)
    return unit(activation_ND @ activation_ND.T, dim=1)


class SimilarityPreserving(Objective):
    """The objective: compares one layer of student and teacher."""

    def __init__(self, options: Sp, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the layers"
        self.tap = options.tap
        self.needs = Needs.at([self.tap])

    def forward(self, lesson: Lesson) -> Tensor:
        return sp_loss(lesson.student.taps[self.tap.student], lesson.teacher.taps[self.tap.teacher])


from_options = SimilarityPreserving
