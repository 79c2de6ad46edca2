"""Feature matching: match one activation of the student with the teacher's, in value or in direction.

The common form of feature distillation, not one paper: FitNets (arXiv:1412.6550) for a middle layer, timm's feature
distillation for the classifier's input.

    r(F_s)    the student's activation, projected to the teacher's width
    l2        mean over N, C and places of (r(F_s) - F_t)²
    cosine    mean over N and places of 1 - cos(r(F_s), F_t), the angle taken over channels: length is free
    kl        mean over N and places of KL(softmax F_t ‖ softmax r(F_s)), the softmax over channels, T = 1

If the maps differ in size, the larger one is averaged down first. That commutes with the projector, a 1 × 1 convolution
with bias (on an embedding: a fully connected layer). A vector of zeros has cosine 0 with every vector and gets no
gradient, because it has no direction.
Shapes: N batch, C channels, H × W places. An embedding, N × C, is a map of one place.
"""

from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import map_or_embedding, same_size, unit
from kdcore.spec.methods.features import Feature


def feature_l2_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean squared difference of N × C × H × W or N × C. Returns a scalar ≥ 0."""
    student_NCHW, teacher_NCHW = same_size(student_NCHW, teacher_NCHW.detach())
    return mse_loss(student_NCHW, teacher_NCHW)


def feature_cosine_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean of 1 - cosine over samples and places of N × C × H × W or N × C. Returns a scalar in [0, 2]."""
    student_NCHW, teacher_NCHW = same_size(student_NCHW, teacher_NCHW.detach())
    cosine_NHW = (unit(student_NCHW, dim=1) * unit(teacher_NCHW, dim=1)).sum(1)
    return (1 - cosine_NHW).mean()


def feature_kl_loss(student_NCHW: Tensor, teacher_NCHW: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over samples and places of N × C × H × W or N × C. Returns a scalar ≥ 0."""
    student_NCHW, teacher_NCHW = same_size(student_NCHW, teacher_NCHW.detach())
    log_student_NCHW, log_teacher_NCHW = log_softmax(student_NCHW, dim=1), log_softmax(teacher_NCHW, dim=1)
    return kl_div(log_student_NCHW, log_teacher_NCHW, reduction="none", log_target=True).sum(1).mean()


class FeatureMatching(Objective):
    """Objective that compares one pair of taps in one of the three forms."""

    def __init__(self, options: Feature, setting: Setting) -> None:
        super().__init__()
        assert options.tap is not None, "resolve() names the layer"
        self.tap = options.tap
        self.loss = _FORMS[options.form]
        self.always_projects = options.projector == "always"
        self.needs = Needs.at([self.tap])
        self.projector: nn.Module = nn.Identity()

    def build(self, lesson: Lesson) -> None:
        student, teacher = map_or_embedding(lesson, self.tap)
        width_in, width_out = student.shape[1], teacher.shape[1]
        if self.always_projects or width_in != width_out:
            self.projector = nn.Conv2d(width_in, width_out, 1, device=student.device, dtype=student.dtype)

    def forward(self, lesson: Lesson) -> Tensor:
        student, teacher = same_size(*map_or_embedding(lesson, self.tap))
        return self.loss(self.projector(student), teacher)


_FORMS = {"l2": feature_l2_loss, "cosine": feature_cosine_loss, "kl": feature_kl_loss}
