"""FSP, flow of the solution procedure: match how the features of one layer relate to those of the next.

Yim, Joo, Bae & Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
Learning", CVPR 2017, section 3, eq. 1 and 2.

    G = 1/HW Σ_hw A_hw B_hwᵀ               the flow from a shallow layer A to a deep one B: C_A × C_B
    L = mean over N, C_A, C_B of (G_s - G_t)², summed over each layer and the next

Eq. 2 sums over the entries of G; the mean is that of the code with which numbers were published (RepDistiller). If A
and B differ in size, the larger is averaged down, as in that code; the paper max-pools. Student and teacher need the
same numbers of channels, because their G are compared directly. They may differ in size.

The method prepares the student: the first stage minimises the flows alone (with weight 1, as RepDistiller, whose beta
applies to the second stage only and multiplies 0 there), the second the labels alone.
Shapes: N batch, C channels, H × W places.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from base.errors import SpecInvalid
from kdcore.lesson import Lesson, Needs, Reduced, equal_shapes
from kdcore.objectives.objective import Objective, Setting, TwoStages
from kdcore.objectives.pairs import maps, same_size
from kdcore.spec.methods.features import Fsp


def fsp_loss(
    student_shallow_NCHW: Tensor, student_deep_NCHW: Tensor, teacher_shallow_NCHW: Tensor, teacher_deep_NCHW: Tensor
) -> Tensor:
    """Mean squared difference of the two flows. Returns a scalar ≥ 0."""
    teacher_NAB = fsp_matrix(teacher_shallow_NCHW.detach(), teacher_deep_NCHW.detach())
    return mse_loss(fsp_matrix(student_shallow_NCHW, student_deep_NCHW), teacher_NAB)


def fsp_matrix(shallow_NCHW: Tensor, deep_NCHW: Tensor) -> Tensor:
    """Mean product over places of each shallow channel with each deep channel: N × C_A × C_B."""
    shallow_NCHW, deep_NCHW = same_size(shallow_NCHW, deep_NCHW)
    shallow_NAP, deep_NBP = shallow_NCHW.flatten(2), deep_NCHW.flatten(2)
    return shallow_NAP @ deep_NBP.mT / shallow_NAP.shape[2]


class SolutionFlow(Objective):
    """Objective that compares the flow from each tap to the next and sums."""

    def __init__(self, options: Fsp, setting: Setting) -> None:
        super().__init__()
        assert options.taps is not None, "resolve() names the layers"
        self.taps = options.taps
        self.flows = [
            Reduced((shallow.teacher, deep.teacher), "flow", fsp_matrix) for shallow, deep in pairwise(self.taps)
        ]
        self.needs = Needs.at(self.taps)

    def build(self, lesson: Lesson) -> None:
        """Check that each pair of layers has equal widths. This objective has no parameters."""
        for pair, (student, teacher) in zip(self.taps, maps(lesson, self.taps), strict=True):
            if student.shape[1] != teacher.shape[1]:
                raise SpecInvalid(
                    f"fsp compares layers of equal width: the student's tap {pair.student!r} has {student.shape[1]} "
                    f"channels, the teacher's {pair.teacher!r} has {teacher.shape[1]}",
                    hint="choose a student of the teacher's widths, or a method that projects (fitnet, vid)",
                )
        # From here on a teacher may send its flows alone.
        self.needs = Needs(tuple(pair.student for pair in self.taps), reduced=tuple(self.flows))

    def forward(self, lesson: Lesson) -> Tensor:
        student = [lesson.student.taps[pair.student] for pair in self.taps]
        pairs = [
            equal_shapes("flows", fsp_matrix(*layers), flow.read(lesson.teacher))
            for layers, flow in zip(pairwise(student), self.flows, strict=True)
        ]
        return torch.stack([mse_loss(*pair) for pair in pairs]).sum()


def from_options(options: Fsp, setting: Setting) -> TwoStages:
    """Two stages: the flows alone, then the labels alone."""
    return TwoStages(first=SolutionFlow(options, setting), then=None)
