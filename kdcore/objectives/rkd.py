"""Relational knowledge distillation: match the distances between embeddings of a batch, and the angles among them.

Park, Kim, Lu & Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, section 3.2.

    d_ij   = ‖x_i - x_j‖₂ / mean of all distances > 0               the student's by its mean, the teacher's by its own
    c_ijk  = cos of the angle at x_j = ⟨(x_i - x_j) / ‖x_i - x_j‖, (x_k - x_j) / ‖x_k - x_j‖⟩
    distance   1/N² Σ_ij  h(d_ij of the student - d_ij of the teacher)
    angle      1/N³ Σ_ijk h(c_ijk of the student - c_ijk of the teacher)
    h(e)   = e²/2 where |e| < 1, |e| - 1/2 beyond: Huber's, in torch smooth L1
    objective = 25 · distance + 50 · angle

The paper sums over pairs and triplets. The authors' code and CRD's take the mean over all, i = j and i = k included,
and the weights 25 and 50 belong to that; so does this page. Distances are not squared.

Angles are computed from the N × N inner products G, not from N × N × D differences:
⟨x_i - x_j, x_k - x_j⟩ = G_ik - G_ij - G_jk + G_jj. For images that are close together such differences cancel almost
all digits, so G is float64. In float32, clusters whose width is a hundredth of their distance had a gradient wrong by a
thousandth.
Samples that float32 can hardly separate count as equal: distance and cosine 0, no gradient. A batch of one gives 0, and
so does one whose samples are equal on both sides. If only the student's samples are equal, the loss is above 0 and has
no gradient. Two samples have distances but no angles.
Shapes: N batch, D width of an embedding, which may differ.
"""

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import embeddings
from kdcore.spec.methods.relations import Rkd


def rkd_distance_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Huber loss of the relative distances. Returns a scalar ≥ 0."""
    return smooth_l1_loss(_relative_distances(student_ND), _relative_distances(teacher_ND.detach()))


def rkd_angle_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Huber loss of the cosines of all angles. Returns a scalar in [0, 3/2]. Needs N³ memory."""
    return smooth_l1_loss(_cosines(student_ND), _cosines(teacher_ND.detach()))


def _relative_distances(x_ND: Tensor) -> Tensor:
    """Distances as multiples of their mean, N × N."""
    _, distance_NN, apart_NN = _geometry(x_ND)
    mean = distance_NN.sum() / apart_NN.sum().clamp(min=1)
    return (distance_NN / torch.where(mean > 0, mean, 1)).to(x_ND.dtype)


def _cosines(x_ND: Tensor) -> Tensor:
    """N × N × N: entry (j, i, k) is the cosine of the angle at x_j between x_i and x_k."""
    products_NN, distance_NN, apart_NN = _geometry(x_ND)
    nearness_NN = torch.where(apart_NN, 1 / torch.where(apart_NN, distance_NN, 1), 0).to(x_ND.dtype)
    seen_NN = products_NN - products_NN.diagonal()[:, None] / 2
    inner_NNN = (products_NN - seen_NN[:, :, None] - seen_NN[:, None, :]).to(x_ND.dtype)
    return inner_NNN * nearness_NN[:, :, None] * nearness_NN[:, None, :]


def _geometry(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products and distances (float64 N × N), and which samples differ. No root is taken of 0."""
    x_ND = x_ND.double()
    products_NN = x_ND @ x_ND.T
    square_N = products_NN.diagonal()
    sum_NN = square_N[:, None] + square_N
    distance_NN = sum_NN - 2 * products_NN
    apart_NN = distance_NN > 1e-14 * sum_NN
    return products_NN, torch.where(apart_NN, torch.where(apart_NN, distance_NN, 1).sqrt(), 0), apart_NN


class RelationalKd(Objective):
    """Objective: the weighted sum of the distance loss and the angle loss."""

    def __init__(self, options: Rkd, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the layers"
        self.tap = options.tap
        self.needs = Needs.at([self.tap])
        self.distance_weight, self.angle_weight = options.distance_weight, options.angle_weight

    def forward(self, lesson: Lesson) -> Tensor:
        student_ND, teacher_ND = embeddings(lesson, self.tap)
        distance = rkd_distance_loss(student_ND, teacher_ND)
        angle = rkd_angle_loss(student_ND, teacher_ND)
        self.observed["rkd/distance"], self.observed["rkd/angle"] = distance.detach(), angle.detach()
        return self.distance_weight * distance + self.angle_weight * angle
