"""Logit standardisation: the student learns the order and relative gaps of the teacher's logits, not their scale.

Sun, Ren, Li, Wang & Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, algorithm 1.

    z ← (z - mean(z)) / (std(z) + 1e-7)        per sample, over its classes; std with K - 1 (unbiased)

Both sides are standardised before any objective on logits. The temperature stays: the paper's base temperature is 2.
Standardised logits carry less gradient, so the paper's weight is 9 (2 to 18, depending on the pair). The authors' code
and algorithm agree.

Equal logits have no deviation to be divided by: they become 0, with the gradient of z - mean(z) instead of one of 1e7
or none. A single class, which has no unbiased deviation, is treated alike.
Shapes: N batch, K classes.
"""

from dataclasses import replace

from torch import Tensor

from kdcore.lesson import Lesson, View
from kdcore.objectives.objective import Objective


def standardize(logits_NK: Tensor) -> Tensor:
    """Return each sample's logits with mean 0 and standard deviation 1."""
    # Relative to the largest logit: the result does not depend on the shift, and equal logits are exactly 0.
    gaps_NK = logits_NK - logits_NK.detach().amax(1, keepdim=True)
    centred_NK = gaps_NK - gaps_NK.mean(1, keepdim=True)
    variance_N1 = centred_NK.square().sum(1, keepdim=True) / max(logits_NK.shape[1] - 1, 1)
    deviation_N1 = variance_N1.masked_fill(variance_N1 == 0, 1).sqrt()  # The square root's gradient at 0 is infinite.
    return centred_NK / (deviation_N1 + 1e-7)


class Standardized(Objective):
    """Another objective on standardised logits; taps are passed on unchanged."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.needs = objective.needs

    def build(self, lesson: Lesson) -> None:
        self.objective.build(_standardized(lesson))
        self.needs = self.objective.needs

    def forward(self, lesson: Lesson) -> Tensor:
        loss: Tensor = self.objective(_standardized(lesson))
        self.observed = self.objective.observed
        return loss


def _standardized(lesson: Lesson) -> Lesson:
    return replace(lesson, student=_view(lesson.student), teacher=_view(lesson.teacher))


def _view(view: View) -> View:
    return replace(view, logits=standardize(view.logits))
