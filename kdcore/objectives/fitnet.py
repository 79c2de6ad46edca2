"""FitNets: a middle layer of the student learns to predict a middle layer of the teacher, the hint.

Romero, Ballas, Kahou, Chassang, Gatta & Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550,
section 2.2, eq. 3.

    r(F_s)      the student's guided layer, mapped by a regressor to the teacher's width
    L = mean over N, C, H, W of (r(F_s) - F_t)²

Eq. 3 has ½ ‖·‖², a sum. The mean is RepDistiller's, and beta 100 belongs to it. Regressors:
    conv      1 × 1 convolution, batch norm. The larger map is averaged down to the smaller first. (In the paper the
              kernel is large enough to remove the extra places; RepDistiller's is strided or transposed.)
    linear    fully connected from all of the student's map to all of the teacher's (section 2.2's costlier choice),
              batch norm.
The batch norm is RepDistiller's: without it, beta 100 and a learning rate of 0.05 end in infinite values within an
epoch. RepDistiller's ReLU after it is left out (the paper has the hint's own non-linearity): a hint may be negative.
The student's layer is projected also if the widths are equal, because its channels may be in another order.

In two stages (section 2.3) the hint comes first, alone, then knowledge distillation. Layers above the guided one get no
gradient from a hint, so an optimizer that skips missing gradients does not change them.
Shapes: N batch, C channels, H × W places. An embedding, N × D, is a map of one place.
"""

from torch import Tensor, nn
from torch.nn.functional import mse_loss

from base.errors import SpecInvalid
from kdcore.lesson import Lesson, Needs
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.objectives.objective import Objective, Setting, TwoStages
from kdcore.objectives.pairs import connector, embeddings, map_or_embedding, same_size
from kdcore.spec.methods.features import FitNet
from kdcore.spec.methods.response import Kd

LARGEST_LINEAR = 2**28
"""Largest number of weights of a fully connected regressor: 1 GiB in float32, and the same for each optimizer state."""


def hint_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean squared difference of two maps of equal shape. Returns a scalar ≥ 0."""
    return mse_loss(student_NCHW, teacher_NCHW.detach())


class Hints(Objective):
    """Objective that compares the regressed guided layer with the teacher's hint layer."""

    def __init__(self, options: FitNet, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the guided layer and the hint"
        self.tap = options.tap
        self.kind = options.regressor
        self.needs = Needs.at([self.tap])
        self.regressor: nn.Module = nn.Identity()  # Until build() has seen the widths.

    def build(self, lesson: Lesson) -> None:
        student, teacher = self._sides(lesson)
        width_in, width_out = student.shape[1], teacher.shape[1]
        if self.kind == "conv":
            self.regressor = connector(width_in, width_out).to(student)
            return
        if width_in * width_out > LARGEST_LINEAR:
            raise SpecInvalid(
                f"a linear regressor from tap {self.tap.student!r} ({width_in} numbers for each image) to "
                f"{self.tap.teacher!r} ({width_out}) would have {width_in * width_out} weights, over {LARGEST_LINEAR}",
                hint="take regressor 'conv', or deeper taps",
            )
        projection = nn.Linear(width_in, width_out, bias=False)
        self.regressor = nn.Sequential(projection, nn.BatchNorm1d(width_out)).to(student)

    def forward(self, lesson: Lesson) -> Tensor:
        student, teacher = self._sides(lesson)
        return hint_loss(self.regressor(student), teacher)

    def _sides(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """The regressor's input and its target."""
        if self.kind == "linear":
            return embeddings(lesson, self.tap)
        return same_size(*map_or_embedding(lesson, self.tap))


def from_options(options: FitNet, setting: Setting) -> Objective | TwoStages:
    """The hint beside the labels; or the paper's two stages: the hint alone, then knowledge distillation."""
    hints = Hints(options, setting)
    return hints if options.stages == "joint" else TwoStages(hints, then=KnowledgeDistillation(Kd(), setting))
