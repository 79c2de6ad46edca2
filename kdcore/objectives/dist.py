"""DIST: match how the student's and the teacher's probabilities correlate, not their exact values.

Huang, You, Wang, Qian & Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536,
section 3.

    p = softmax(z / T)
    ρ(u, v) = (u - mean u) · (v - mean v) / (‖u - mean u‖ ‖v - mean v‖ + 1e-8)            Pearson's correlation
    between = 1/N Σ_n (1 - ρ(p_s[n, :], p_t[n, :]))          the classes of one sample, row by row
    within  = 1/K Σ_k (1 - ρ(p_s[:, k], p_t[:, k]))          one class over the batch, column by column
    L = T² · (β between + γ within)

This is the authors' code; T² and the 1e-8 are in the code only. The 1e-8 matters where probabilities are tiny: a class
with almost no probability has a correlation near 0. The paper has β = γ = 2 beside labels at 1. The code has β = γ = 1
and a weight before the whole loss: that 2 is the job's beta here. T = 1 is the authors' choice for ImageNet. Their code
has a switch for another T on CIFAR-100; others report that it was 4.

`within` is a statistic over the batch: the batch size changes the loss. Two numbers always correlate by 1 or -1: with
two classes `between` only counts the samples whose order is reversed and has almost no gradient. The same holds for
`within` and the classes in a batch of two.

A row or column in which the teacher is constant (every column in a batch of one) counts 0; in the authors' code it is a
constant 1. One in which only the student is constant counts 1, as in theirs. Its gradient has length 1 and points to
the teacher's; theirs has the same direction and a length of up to 1e8.
Shapes: N batch, K classes, R rows of M numbers each.
"""

from torch import Tensor
from torch.nn.functional import softmax

from kdcore.lesson import Lesson
from kdcore.objectives.objective import Objective, Setting
from kdcore.spec.methods.response import Dist


def dist_loss(
    student_NK: Tensor,
    teacher_NK: Tensor,
    *,
    temperature: float,
    between_weight: float = 1.0,
    within_weight: float = 1.0,
) -> Tensor:
    """T² · (β · between classes + γ · within classes). Returns a scalar in [0, 2T² (β + γ)]."""
    student_NK = softmax(student_NK / temperature, dim=1)
    teacher_NK = softmax(teacher_NK.detach() / temperature, dim=1)
    between = pearson_distance(student_NK, teacher_NK).mean()
    within = pearson_distance(student_NK.T, teacher_NK.T).mean()
    return temperature**2 * (between_weight * between + within_weight * within)


def pearson_distance(student_RM: Tensor, teacher_RM: Tensor) -> Tensor:
    """1 - ρ of each row, in [0, 2]; 0 where the teacher's row is constant."""
    student_RM, teacher_RM = _centred(student_RM), _centred(teacher_RM)
    student_R, teacher_R = student_RM.square().sum(1), teacher_RM.square().sum(1)
    lengths_R = _root(student_R) * _root(teacher_R)
    correlation_R = (student_RM * teacher_RM).sum(1) / (lengths_R + 1e-8)
    return (1 - correlation_R).masked_fill(teacher_R == 0, 0)


def _centred(rows_RM: Tensor) -> Tensor:
    # Relative to the first number, so that a constant row becomes exactly 0, without rounding errors.
    gaps_RM = rows_RM - rows_RM.detach()[:, :1]
    return gaps_RM - gaps_RM.mean(1, keepdim=True)


def _root(squares_R: Tensor) -> Tensor:
    """Square roots; 1 for 0, where the gradient of the root is infinite."""
    return squares_R.masked_fill(squares_R == 0, 1).sqrt()


class CorrelationKd(Objective):
    """Objective that compares how the softened probabilities of student and teacher correlate."""

    def __init__(self, options: Dist, setting: Setting) -> None:
        super().__init__()
        assert setting.temperature is not None, "resolve() gives dist its temperature"
        self.temperature = setting.temperature
        self.between_weight = options.between_weight
        self.within_weight = options.within_weight

    def forward(self, lesson: Lesson) -> Tensor:
        return dist_loss(
            *lesson.logits,
            temperature=self.temperature,
            between_weight=self.between_weight,
            within_weight=self.within_weight,
        )
