"""A student alone with its labels: supervised training, and the baseline of every distillation."""

from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Batch, Round


class Alone:
    def __init__(self, student: Classifier) -> None:
        self.student = student
        self.models = {"student": student}

    def learners(self) -> list[nn.Module]:
        return [self.student]

    def round(self, batch: Batch) -> Round:
        return Round((self.student(batch.inputs),), batch.labels)
