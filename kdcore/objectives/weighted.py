"""Several objectives as one: their weighted sum."""

from collections.abc import Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn

from kdcore.lesson import NOTHING, Lesson, Needs
from kdcore.objectives.objective import Objective


class WeightedSum(Objective):
    """Σ weight · objective(lesson). The value of each term is observed under its name."""

    def __init__(self, terms: Sequence[tuple[str, float, Objective]]) -> None:
        super().__init__()
        self.names = [name for name, _, _ in terms]
        self.weights = [weight for _, weight, _ in terms]
        self.objectives = [objective for _, _, objective in terms]
        self.parts = nn.ModuleList(self.objectives)
        self.needs = self._needs()

    def build(self, lesson: Lesson) -> None:
        for objective in self.objectives:
            objective.build(lesson)
        self.needs = self._needs()

    def _needs(self) -> Needs:
        return reduce(or_, (objective.needs for objective in self.objectives), NOTHING)

    def forward(self, lesson: Lesson) -> Tensor:
        values = [objective(lesson) for objective in self.objectives]
        self.observed = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        for objective in self.objectives:
            self.observed |= objective.observed
        weighted = [weight * value for weight, value in zip(self.weights, values, strict=True)]
        return torch.stack(weighted).sum()
