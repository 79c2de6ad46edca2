"""A teacher alone: an objective prepares what it owns, before any student looks."""

from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Batch, Lesson, Needs, Round
from kdcore.teacher import Teacher


class Preparation:
    def __init__(self, teacher: Teacher, needs: Needs) -> None:
        self.teacher = teacher
        self.models: dict[str, Classifier] = {}
        teacher.show(needs)

    def learners(self) -> list[nn.Module]:
        """None: only the objective learns."""
        return []

    def round(self, batch: Batch) -> Round:
        view = self.teacher(batch)
        return Round((), batch.labels, (Lesson(view, view, batch),))
