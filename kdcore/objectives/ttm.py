"""Transformed teacher matching: only the teacher has a temperature, and uncertain answers of the teacher count more.

Zheng & Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024, arXiv:2402.11148.

    p̃_t,c = p_t,c^γ / U        U = Σ_c p_t,c^γ                the power transform, γ = 1/T: softmax(z_t / T)
    TTM    1/N Σ_n     KL(p̃_t ‖ p_s)                          the student at temperature 1
    WTTM   1/N Σ_n U · KL(p̃_t ‖ p_s)                          U is 1 for a certain teacher, K^(1-γ) for a uniform one

The student has no temperature that would shrink its gradient, so there is no T². Paper and authors' code agree. Their
weights depend on the pair: for vgg13 to vgg8 TTM has γ = 0.1 and beta 45, WTTM γ = 0.2 and beta 4 (beside CRD). Here γ
is given by the job's temperature: 5 is 0.2.
Shapes: N batch, K classes.
"""

from torch import Tensor
from torch.nn.functional import log_softmax

from kdcore.lesson import Lesson
from kdcore.objectives.objective import Objective, Setting
from kdcore.spec.methods.response import Ttm


def ttm_loss(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float = 5.0, weighted: bool = True) -> Tensor:
    """KL(transformed teacher ‖ student); `weighted`: each sample times its power sum U. Returns a scalar ≥ 0."""
    log_teacher_NK = log_softmax(teacher_NK.detach(), dim=1)
    log_powers_NK = log_teacher_NK / temperature
    log_power_sum_N1 = log_powers_NK.logsumexp(1, keepdim=True)
    log_target_NK = log_powers_NK - log_power_sum_N1
    divergence_N = (log_target_NK.exp() * (log_target_NK - log_softmax(student_NK, dim=1))).sum(1)
    return (log_power_sum_N1.exp().squeeze(1) * divergence_N).mean() if weighted else divergence_N.mean()


class TransformedTeacher(Objective):
    """Objective that compares the student's probabilities at T = 1 with the teacher's transformed ones."""

    def __init__(self, options: Ttm, setting: Setting) -> None:
        super().__init__()
        assert setting.temperature is not None, "resolve() gives ttm its temperature"
        self.temperature, self.weighted = setting.temperature, options.weighted

    def forward(self, lesson: Lesson) -> Tensor:
        student_NK, teacher_NK = lesson.logits
        return ttm_loss(student_NK, teacher_NK, temperature=self.temperature, weighted=self.weighted)
