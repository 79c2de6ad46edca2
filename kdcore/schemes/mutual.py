"""Students that teach each other while all of them learn.

Zhang et al., "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384, section 2.3, K networks:

    loss_i = cross-entropy_i + 1/(K-1) Σ_{j≠i} KL(p_j ‖ p_i)

Every p is of the same forward pass, and each p_j is held fixed in the loss of the others. Each network has an
optimizer of its own. (The paper's algorithm 1 updates one network after the other; the authors' code and later ports
update all from one forward pass, as here.)
"""

from collections.abc import Sequence

from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import NOTHING, Batch, Lesson, Needs, Round, View


class Mutual:
    def __init__(self, students: Sequence[Classifier], needs: Needs = NOTHING) -> None:
        self.students = list(students)
        self.models = {name(number): student for number, student in enumerate(self.students, 1)}
        for student in self.students:
            # Each is both: it learns at the one side of a pair of taps, and teaches at the other.
            student.watch([*needs.student_taps, *needs.teacher_taps])

    def learners(self) -> list[nn.Module]:
        """Each student: each is trained by an optimizer of its own."""
        return list(self.students)

    def round(self, batch: Batch) -> Round:
        views = [student(batch.inputs) for student in self.students]
        fixed = [_fixed(view) for view in views]
        share = 1 / (len(views) - 1)
        lessons = (
            Lesson(learner, fixed[j], batch, share)
            for i, learner in enumerate(views)
            for j in range(len(views))
            if j != i
        )
        return Round(tuple(views), batch.labels, tuple(lessons))


def name(number: int) -> str:
    """`student`, `student-2`, `student-3`, …"""
    return "student" if number == 1 else f"student-{number}"


def _fixed(view: View) -> View:
    return View(view.logits.detach(), {path: tap.detach() for path, tap in view.taps.items()})
