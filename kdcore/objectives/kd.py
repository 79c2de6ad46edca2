"""Knowledge distillation: match the teacher's probabilities of all classes, softened by a temperature.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2.

    p = softmax(z / T)
    kl                 T² · 1/N Σ_n Σ_k p_t (log p_t - log p_s)
    cross_entropy    - T² · 1/N Σ_n Σ_k p_t log p_s           the same gradient; the value includes H(p_t)
    probabilities_l2   T² · 1/N Σ_n Σ_k (p_t - p_s)²
    logits_l2               1/NK Σ_n Σ_k (z_t - z_s)²         Ba & Caruana, NeurIPS 2014, arXiv:1312.6184, eq. 1

T² cancels the factor 1/T² that the temperature puts on the gradient (section 2, last paragraph), so that the weight of
the labels need not change with T. Sums run over classes, means over the batch: PyTorch's 'batchmean', not its 'mean'.
At high T the kl of centred logits tends to half of logits_l2 (section 2.1).
Shapes: N batch, K classes.
"""

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax

from kdcore.lesson import Lesson
from kdcore.objectives.objective import Objective, Setting
from kdcore.spec.methods.response import Kd


def kd_kl_loss(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student). Returns a scalar ≥ 0."""
    log_student_NK = log_softmax(student_NK / temperature, dim=1)
    log_teacher_NK = log_softmax(teacher_NK.detach() / temperature, dim=1)
    return temperature**2 * kl_div(log_student_NK, log_teacher_NK, reduction="batchmean", log_target=True)


def kd_cross_entropy_loss(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float) -> Tensor:
    """T² · cross-entropy H(teacher, student). Returns a scalar ≥ T² · H(teacher)."""
    log_student_NK = log_softmax(student_NK / temperature, dim=1)
    teacher_p_NK = softmax(teacher_NK.detach() / temperature, dim=1)
    return -(temperature**2) * (teacher_p_NK * log_student_NK).sum(1).mean()


def kd_probabilities_l2_loss(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float) -> Tensor:
    """T² · squared distance of the probabilities. Returns a scalar in [0, 2T²].

    The gradient is small where the student is confident and wrong.
    """
    difference_NK = softmax(student_NK / temperature, dim=1) - softmax(teacher_NK.detach() / temperature, dim=1)
    return temperature**2 * difference_NK.square().sum(1).mean()


def kd_logits_l2_loss(student_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Mean squared difference of the logits over batch and classes. Returns a scalar ≥ 0."""
    return (student_NK - teacher_NK.detach()).square().mean()


class KnowledgeDistillation(Objective):
    """Objective that compares the logits of student and teacher in one of the four forms."""

    def __init__(self, options: Kd, setting: Setting) -> None:
        super().__init__()
        self.form = options.form
        self.temperature = setting.temperature

    def forward(self, lesson: Lesson) -> Tensor:
        student_NK, teacher_NK = lesson.logits
        if self.form == "logits_l2":
            return kd_logits_l2_loss(student_NK, teacher_NK)
        assert self.temperature is not None, "resolve() gives every softened form its temperature"
        return _SOFTENED[self.form](student_NK, teacher_NK, temperature=self.temperature)


_SOFTENED = {
    "kl": kd_kl_loss,
    "cross_entropy": kd_cross_entropy_loss,
    "probabilities_l2": kd_probabilities_l2_loss,
}
