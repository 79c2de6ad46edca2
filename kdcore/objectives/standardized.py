"""Logit standardisation: the student learns how the teacher ranks the classes, not how loudly it speaks.

Sun, Ren, Li, Wang & Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, algorithm 1.

    z ← (z - mean(z)) / (std(z) + 1e-7)        per sample, over its classes; std with K - 1 (unbiased)

Both sides, in front of any objective on logits. The temperature stays: the paper's base temperature is 2. What is left
of a sample carries less gradient than before, so the paper weighs it by 9 (2 to 18 by the pair). Their code and
algorithm agree.

Logits that are all equal have no deviation to be divided by: they become 0, with the gradient of z - mean(z) instead of
one of 1e7 or none at all. So does a single class, which has no unbiased deviation.
Shapes: N batch, K classes.
"""

from dataclasses import replace

from torch import Tensor

from kdcore.lesson import Lesson, View
from kdcore.objectives.objective import Objective


def standardize(logits_NK: Tensor) -> Tensor:
    """Each sample's logits at mean 0 and standard deviation 1: only their order and relative gaps are left."""
    # From the largest logit down: the result does not know the shift, and equal logits are exactly 0, not nearly.
    gaps_NK = logits_NK - logits_NK.detach().amax(1, keepdim=True)
    centred_NK = gaps_NK - gaps_NK.mean(1, keepdim=True)
    variance_N1 = centred_NK.square().sum(1, keepdim=True) / max(logits_NK.shape[1] - 1, 1)
    deviation_N1 = variance_N1.masked_fill(variance_N1 == 0, 1).sqrt()  # The square root's gradient at 0 is infinite.
    return centred_NK / (deviation_N1 + 1e-7)


class Standardized(Objective):
    """The objective that another one becomes when it is shown standardised logits; taps are passed on untouched."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.student_taps = objective.student_taps
        self.teacher_taps = objective.teacher_taps
        self.teacher_layers = objective.teacher_layers
        self.needs_input_gradient = objective.needs_input_gradient
        self.observed = objective.observed

    def build(self, lesson: Lesson) -> None:
        self.objective.build(_standardized(lesson))

    def forward(self, lesson: Lesson) -> Tensor:
        loss: Tensor = self.objective(_standardized(lesson))
        return loss


def _standardized(lesson: Lesson) -> Lesson:
    return replace(lesson, student=_view(lesson.student), teacher=_view(lesson.teacher))


def _view(view: View) -> View:
    return replace(view, logits=standardize(view.logits))
