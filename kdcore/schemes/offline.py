"""A trained teacher, frozen, and one student: both look at the same view of each image."""

from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Batch, Lesson, Round
from kdcore.teacher import FrozenTeacher


class Offline:
    def __init__(self, student: Classifier, teacher: FrozenTeacher) -> None:
        self.student = student
        self.teacher = teacher

    def trained(self) -> nn.Module:
        """What the optimizer trains: the student, never the teacher."""
        return self.student

    def round(self, batch: Batch) -> Round:
        student = self.student(batch.inputs)
        return Round(views=(student,), lessons=(Lesson(student, self.teacher(batch), batch),))
