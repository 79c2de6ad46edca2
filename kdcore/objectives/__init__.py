"""What is taught: one page a paper. An objective sees a Lesson; it runs no model and knows no scheme."""

from collections.abc import Callable

from torch import Tensor

from kdcore.lesson import Lesson
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.spec import JobSpec, Kd

Objective = Callable[[Lesson], Tensor]


def build(spec: JobSpec) -> Objective | None:
    """The objective that a resolved spec asks for; None where labels are all there is."""
    if isinstance(spec.method, Kd):
        return KnowledgeDistillation(spec.method.form, spec.temperature, spec.method.standardize)
    return None
