"""Several objectives as one: their weighted sum."""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from kdcore.lesson import Lesson
from kdcore.objectives.objective import Objective


class WeightedSum(Objective):
    """Σ weight · objective(lesson). Each one's own value is observed under its name."""

    def __init__(self, terms: Sequence[tuple[str, float, Objective]]) -> None:
        super().__init__()
        self.names = [name for name, _, _ in terms]
        self.weights = [weight for _, weight, _ in terms]
        self.objectives = objectives = [objective for _, _, objective in terms]
        self.parts = nn.ModuleList(objectives)
        self.student_taps = _every(objective.student_taps for objective in objectives)
        self.teacher_taps = _every(objective.teacher_taps for objective in objectives)
        self.teacher_layers = _every(objective.teacher_layers for objective in objectives)
        self.needs_input_gradient = any(objective.needs_input_gradient for objective in objectives)

    def build(self, lesson: Lesson) -> None:
        for objective in self.objectives:
            objective.build(lesson)

    def forward(self, lesson: Lesson) -> Tensor:
        values = [objective(lesson) for objective in self.objectives]
        self.observed = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        for objective in self.objectives:
            self.observed |= objective.observed
        weighted = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        return torch.stack(weighted).sum()


def _every(paths: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Each path once, in order."""
    return tuple(dict.fromkeys(chain.from_iterable(paths)))
