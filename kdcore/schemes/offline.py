"""A trained teacher, frozen, and one student: both look at the same view of each image."""

from dataclasses import replace

from torch import nn

from kdcore.classifier import Classifier, answered
from kdcore.lesson import NOTHING, Batch, Lesson, Needs, Round
from kdcore.teacher import Teacher


class Offline:
    """`answers`: where a label is unknown, the class that the teacher finds most likely stands in for it: training on
    what the teacher says (Kim & Rush, EMNLP 2016, arXiv:1606.07947, sequence-level distillation)."""

    def __init__(self, student: Classifier, teacher: Teacher, needs: Needs = NOTHING, answers: bool = False) -> None:
        self.student, self.teacher, self.needs, self.answers = student, teacher, needs, answers
        self.models = {"student": student}
        student.watch(needs.student_taps)
        teacher.show(needs)

    def learners(self) -> list[nn.Module]:
        """The student, never the teacher."""
        return [self.student]

    def round(self, batch: Batch) -> Round:
        teacher = self.teacher(batch)
        if self.answers:
            batch = replace(batch, labels=answered(batch.labels, teacher.logits))
        student = self.student(batch.inputs, batch.labels if self.needs.input_gradient else None)
        return Round((student,), batch.labels, (Lesson(student, teacher, batch),))
