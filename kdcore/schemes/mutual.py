"""Students that teach each other while all of them learn.

Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384, section 2.3, K networks:

    loss_i = cross-entropy_i + 1/(K-1) Σ_{j≠i} KL(p_j ‖ p_i)

All p come from one forward pass, and p_j is detached in the losses of the others. Each network has an optimizer of its
own. The paper's algorithm 1 updates one network after the other; the authors' code and later ports update all from one
forward pass, as here.
"""

from collections.abc import Sequence

from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import NOTHING, Batch, Lesson, Needs, StepOutput, View


class Mutual:
    """The scheme; its models are `student`, `student-2`, `student-3`, …"""

    teacher = None

    def __init__(self, students: Sequence[Classifier], needs: Needs = NOTHING) -> None:
        self.students = list(students)
        first, *others = self.students
        self.models = {"student": first} | {f"student-{number}": peer for number, peer in enumerate(others, 2)}
        for student in self.students:
            # Each student has both roles: it learns at one tap of a pair and teaches at the other.
            student.watch([*needs.student_taps, *needs.teacher_taps])

    def learners(self) -> list[nn.Module]:
        return list(self.students)

    def run(self, batch: Batch) -> StepOutput:
        views = [student(batch.inputs) for student in self.students]
        fixed = [View(view.logits.detach(), {path: tap.detach() for path, tap in view.taps.items()}) for view in views]
        share = 1 / (len(views) - 1)
        lessons = (
            Lesson(learner, fixed[j], batch, share)
            for i, learner in enumerate(views)
            for j in range(len(views))
            if j != i
        )
        return StepOutput(tuple(views), batch.labels, tuple(lessons))
