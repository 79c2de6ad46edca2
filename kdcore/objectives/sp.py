"""Similarity-preserving distillation: match which images of a batch have similar activations.

Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682, section 3.1.

    F = a layer's activations, one row for each image              N × D
    G = F · Fᵀ, each row scaled to length 1                        similarity of each pair of images
    L = ‖G_student - G_teacher‖²_F / N²

The code with which numbers were published (CRD's, beta 3000, checked by the authors) uses this formula. Student and
teacher may have different widths and sizes, because only N × N matrices are compared. L depends on the batch; a batch
of one gives 0, unless one layer is all zeros.
A map of zeros has similarity 0 with every image, itself included. Its row of G gets no gradient. Its column does, so
the map gets one, unless all maps of the batch are zeros.
Shapes: N batch, C channels, H × W places, D = C · H · W.
"""

from torch import Tensor

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import embeddings, unit
from kdcore.spec.methods.relations import Sp


def sp_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean squared difference of the two similarity matrices. Returns a scalar ≥ 0. Any shape after N is allowed."""
    return (_similarities(student_NCHW) - _similarities(teacher_NCHW.detach())).square().mean()


def _similarities(activation_NCHW: Tensor) -> Tensor:
    """Inner products of all pairs of images, each row scaled to length 1: N × N."""
    activation_ND = activation_NCHW.flatten(1)
    return unit(activation_ND @ activation_ND.T, dim=1)


class SimilarityPreserving(Objective):
    """Objective that compares one layer of student and teacher."""

    def __init__(self, options: Sp, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the layers"
        self.tap = options.tap
        self.needs = Needs.at([self.tap])

    def forward(self, lesson: Lesson) -> Tensor:
        return sp_loss(*embeddings(lesson, self.tap))
