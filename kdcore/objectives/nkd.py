"""Normalized knowledge distillation: match the label's probability and the distribution over the other classes.

Yang, Zeng, Li, Zhang, Yuan & Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv:2303.13005, the loss L_nkd.

    s, t = softmax(z)                            at temperature 1
    q    = softmax(z / λ) over the classes except the label y
    L = 1/N Σ_n [ - t_y log s_y  -  γ λ² Σ_{c≠y} q_t,c log q_s,c ]

Both parts are cross-entropies, not divergences: at s = t the loss is not 0, because the target's part and the teacher's
entropy among the other classes remain. The other classes are normalised to sum 1 on both sides. Without that they could
not all be matched, because their sums differ wherever s_y ≠ t_y. The label is taken out of z before the softmax. The
labels' own cross-entropy is not part of this loss; the job's alpha weighs it (the authors: 1).

Paper and authors' code (cls_KD) agree. γ = 1.5 and λ = 1 are the authors' values for ImageNet; their CIFAR-100 recipe
for ResNet-34 to ResNet-18 has γ = 3.5 and λ = 3. λ is the job's temperature.

With two classes there is one other class: q is 1 on both sides, and its part is exactly 0.
Shapes: N batch, K ≥ 2 classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from kdcore.lesson import Lesson
from kdcore.objectives.objective import Objective, Setting
from kdcore.spec.methods.response import Nkd


def nkd_loss(
    student_NK: Tensor, teacher_NK: Tensor, labels_N: Tensor, *, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """Target's part + γ λ² · others' part. Returns a scalar ≥ 0. `labels_N`: int64 in 0..K-1; `temperature` is λ."""
    teacher_NK = teacher_NK.detach()
    is_target_NK = labels_N[:, None] == torch.arange(student_NK.shape[1], device=labels_N.device)
    target_p_N = softmax(teacher_NK, dim=1).masked_fill(~is_target_NK, 0).sum(1)
    target_N = -target_p_N * log_softmax(student_NK, dim=1).masked_fill(~is_target_NK, 0).sum(1)
    log_student_NK = log_softmax((student_NK / temperature).masked_fill(is_target_NK, -torch.inf), dim=1)
    teacher_q_NK = softmax((teacher_NK / temperature).masked_fill(is_target_NK, -torch.inf), dim=1)
    # The target's log-probability is -inf and its weight 0; their product would be NaN.
    others_N = -(teacher_q_NK * log_student_NK.masked_fill(is_target_NK, 0)).sum(1)
    return (target_N + gamma * temperature**2 * others_N).mean()


class NormalizedKd(Objective):
    """Objective that compares logits around each image's label."""

    def __init__(self, options: Nkd, setting: Setting) -> None:
        super().__init__()
        assert setting.temperature is not None, "resolve() gives nkd its temperature"
        self.gamma = options.gamma
        self.temperature = setting.temperature

    def forward(self, lesson: Lesson) -> Tensor:
        student_NK, teacher_NK = lesson.logits
        labels_N = lesson.batch.labels
        return nkd_loss(student_NK, teacher_NK, labels_N, gamma=self.gamma, temperature=self.temperature)
