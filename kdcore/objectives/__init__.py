"""What is taught: one page a paper. An objective sees a Lesson; it runs no model and knows no scheme."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdcore.lesson import Lesson
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.objectives.objective import Setting
from kdcore.objectives.standardized import Standardized
from kdcore.spec import JobSpec, Kd

Objective = Callable[[Lesson], Tensor]


def build(spec: JobSpec) -> Objective | None:
    """The objective that a resolved spec asks for; None where labels are all there is."""
    if not isinstance(spec.method, Kd):
        return None
    nobody = torch.empty(0, dtype=torch.int64)
    setting = Setting(spec.temperature, num_classes=0, epochs=spec.training.epochs, labels=nobody, rows=nobody)
    objective = KnowledgeDistillation(spec.method, setting)
    return Standardized(objective) if spec.method.standardize else objective
