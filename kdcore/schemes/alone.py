"""A student alone with its labels: supervised training, and the baseline of every distillation."""

from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Batch, Round


class Alone:
    def __init__(self, student: Classifier) -> None:
        self.student = student

    def trained(self) -> nn.Module:
        """What the optimizer trains."""
        return self.student

    def round(self, batch: Batch) -> Round:
        return Round(views=(self.student(batch.inputs),))
