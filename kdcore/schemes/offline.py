"""One student: taught by a frozen teacher, or by labels alone; and the stage before it, which has no student."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from kdcore.classifier import Classifier, answered
from kdcore.lesson import NOTHING, Batch, Lesson, Needs, StepOutput, Teacher


class Offline:
    """A frozen teacher and a student see the same view of each image.

    With `answers`, the teacher's most likely class replaces an unknown label (Kim & Rush, EMNLP 2016, arXiv:1606.07947,
    sequence-level distillation).
    """

    def __init__(self, student: Classifier, teacher: Teacher, needs: Needs = NOTHING, answers: bool = False) -> None:
        self.student, self.teacher, self.needs, self.answers = student, teacher, needs, answers
        self.models = {"student": student}
        student.watch(needs.student_taps)
        teacher.show(needs)

    def learners(self) -> list[nn.Module]:
        return [self.student]

    def run(self, batch: Batch) -> StepOutput:
        teacher = self.teacher(batch)
        if self.answers:
            batch = replace(batch, labels=answered(batch.labels, teacher.logits))
        student = self.student(batch.inputs, batch.labels if self.needs.input_gradient else None)
        return StepOutput((student,), batch.labels, (Lesson(student, teacher, batch),))


class Alone:
    """A student with labels alone: supervised training, and the baseline of every distillation."""

    def __init__(self, student: Classifier) -> None:
        self.student = student
        self.models = {"student": student}

    def learners(self) -> list[nn.Module]:
        return [self.student]

    def run(self, batch: Batch) -> StepOutput:
        return StepOutput((self.student(batch.inputs),), batch.labels)


class Preparation:
    """A teacher without a student: only the objective's own modules are trained."""

    def __init__(self, teacher: Teacher, needs: Needs) -> None:
        self.teacher = teacher
        self.models: Mapping[str, Classifier] = {}
        teacher.show(needs)

    def learners(self) -> list[nn.Module]:
        return []

    def run(self, batch: Batch) -> StepOutput:
        view = self.teacher(batch)
        return StepOutput((), batch.labels, (Lesson(view, view, batch),))
