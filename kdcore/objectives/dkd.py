"""Decoupled knowledge distillation: weigh the target class and the distribution over the other classes separately.

Zhao, Cui, Song, Qiu & Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679, sections 3.1 and 3.3.

    p = softmax(z / T)
    b = (p_y, 1 - p_y)                           the target class y against all others
    q = softmax(z / T) over the other classes
    KL(p_t ‖ p_s) = KL(b_t ‖ b_s) + (1 - p_t,y) · KL(q_t ‖ q_s)             KD
    L = T² · 1/N Σ_n [ α KL(b_t ‖ b_s) + β KL(q_t ‖ q_s) ]                  DKD

In KD the second part has a small weight where the teacher is confident. Here its weight is constant: α = 1, β = 8 for
most pairs on CIFAR-100, less for weak teachers (2 for ResNet-56 to ResNet-20). T² is in the authors' code, not in the
equation; so is the warm-up: the loss is multiplied by min(epoch / 20, 1) in 240 epochs. Both are followed.

The authors take log(p_y) and log(1 - p_y) of softmax's result, which are -inf for a confident student; here both are
computed from the log-odds. With two classes there is one other class: q is 1 on both sides, and its part is exactly 0.
Shapes: N batch, K ≥ 2 classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from kdcore.lesson import Lesson
from kdcore.objectives.objective import Objective, Setting
from kdcore.spec.methods.response import Dkd


def dkd_loss(
    student_NK: Tensor,
    teacher_NK: Tensor,
    labels_N: Tensor,
    *,
    temperature: float,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
) -> Tensor:
    """T² · (α · KL of the target class + β · KL of the others). Returns a scalar ≥ 0. `labels_N`: int64 in 0..K-1."""
    student_NK, teacher_NK = student_NK / temperature, teacher_NK.detach() / temperature
    is_target_NK = labels_N[:, None] == torch.arange(student_NK.shape[1], device=labels_N.device)
    target_N = _target_kl(_log_odds(student_NK, is_target_NK), _log_odds(teacher_NK, is_target_NK))
    non_target_N = _non_target_kl(student_NK, teacher_NK, is_target_NK)
    return temperature**2 * (target_weight * target_N + non_target_weight * non_target_N).mean()


def _log_odds(logits_NK: Tensor, is_target_NK: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)); its sigmoid is p_y."""
    target_N = logits_NK.masked_fill(~is_target_NK, 0).sum(1)
    return target_N - logits_NK.masked_fill(is_target_NK, -torch.inf).logsumexp(1)


def _target_kl(student_N: Tensor, teacher_N: Tensor) -> Tensor:
    """KL divergence between two Bernoulli distributions, each given by its log-odds."""
    target_N = teacher_N.sigmoid() * (logsigmoid(teacher_N) - logsigmoid(student_N))
    others_N = (-teacher_N).sigmoid() * (logsigmoid(-teacher_N) - logsigmoid(-student_N))
    return target_N + others_N


def _non_target_kl(student_NK: Tensor, teacher_NK: Tensor, is_target_NK: Tensor) -> Tensor:
    # The target's log-probability is -inf on both sides. It is set to 0 first, because inf - inf is NaN.
    log_student_NK = log_softmax(student_NK.masked_fill(is_target_NK, -torch.inf), dim=1)
    log_teacher_NK = log_softmax(teacher_NK.masked_fill(is_target_NK, -torch.inf), dim=1)
    difference_NK = log_teacher_NK.masked_fill(is_target_NK, 0) - log_student_NK.masked_fill(is_target_NK, 0)
    return (log_teacher_NK.exp() * difference_NK).sum(1)


class DecoupledKd(Objective):
    """Objective that compares logits around each image's label. Its weight grows over the warm-up epochs."""

    def __init__(self, options: Dkd, setting: Setting) -> None:
        super().__init__()
        assert setting.temperature is not None, "resolve() gives dkd its temperature"
        assert options.warmup_epochs is not None, "resolve() gives dkd its warm-up"
        self.temperature = setting.temperature
        self.target_weight = options.target_weight
        self.non_target_weight = options.non_target_weight
        self.warmup_epochs = options.warmup_epochs

    def forward(self, lesson: Lesson) -> Tensor:
        loss = dkd_loss(
            *lesson.logits,
            lesson.batch.labels,
            temperature=self.temperature,
            target_weight=self.target_weight,
            non_target_weight=self.non_target_weight,
        )
        return lesson.batch.warmed_up(self.warmup_epochs) * loss
