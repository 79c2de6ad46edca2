"""Probabilistic knowledge transfer: match, for each image, the probabilities that other images are its neighbours.

Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv:1803.10837,
with the cosine kernel, which needs no bandwidth.

    x̂_i  = x_i / (‖x_i‖ + ε)
    k_ij = (x̂_i·x̂_j + 1) / 2                                       in [0, 1]
    p_ij = k_ij / Σ_l k_il                                          probability that j is the neighbour of i
    L    = 1/N² Σ_ij p_ij log((p_ij + ε) / (q_ij + ε))              p the teacher's, q the student's, ε = 1e-7

This is the authors' code, with which CRD's numbers were made. It keeps j = i among the neighbours and divides a sum of
N divergences by N²; the usual beta of 30000 makes up for that. So L depends on the batch; a batch of one gives 0.
A vector of zeros has cosine 0 with every vector. If other vectors of the batch are not zero it gets a gradient, and a
very large one, in the order of 1/ε. If all vectors are zero, none gets a gradient.
Shapes: N batch, D width of an embedding, which may differ.
"""

from torch import Tensor
from torch.linalg import vector_norm

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import embeddings
from kdcore.spec.methods.relations import Pkt

_EPSILON = 1e-7


def pkt_loss(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Divergence of the neighbours' probabilities over N². Returns a scalar ≥ 0 up to ε."""
    student_NN, teacher_NN = _neighbours(student_ND), _neighbours(teacher_ND.detach())
    return (teacher_NN * ((teacher_NN + _EPSILON) / (student_NN + _EPSILON)).log()).mean()


def _neighbours(x_ND: Tensor) -> Tensor:
    """For each sample the probabilities that the others are its neighbours, N × N."""
    x_ND = x_ND / (vector_norm(x_ND, dim=1, keepdim=True) + _EPSILON)
    kernel_NN = ((x_ND @ x_ND.T + 1) / 2).clamp(min=0)  # Opposite vectors may round to less than 0.
    return kernel_NN / kernel_NN.sum(1, keepdim=True)


class ProbabilisticTransfer(Objective):
    """Objective that compares the neighbours' probabilities in the embeddings of student and teacher."""

    def __init__(self, options: Pkt, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the layers"
        self.tap = options.tap
        self.needs = Needs.at([self.tap])

    def forward(self, lesson: Lesson) -> Tensor:
        return pkt_loss(*embeddings(lesson, self.tap))
