"""Self-distillation: an early exit learns the deepest classifier's answers, and its features.

Zhang et al., "Be Your Own Teacher", ICCV 2019, arXiv:1905.08094, section 3.2, losses 2 and 3:

    T² · 1/N Σ_n Σ_k - p_deep log p_exit  +  w · 1/N Σ_n ‖f_exit - f_deep‖²        p = softmax(z / T)

The paper weighs the first by alpha and the second by lambda; here beta is its alpha, and beta · w its lambda. The
public port has the sum over the batch too, with lambda 1e-6 for batches of 128: w = 1e-6 · 128 / 0.1 is the same.
Deep logits and features are held fixed. Shapes: N batch, K classes, D width of the embedding.
"""

from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from kdcore.lesson import EMBEDDING, Lesson
from kdcore.objectives.objective import Objective, Setting
from kdcore.spec.methods.schemes import Byot


def exit_logits_loss(exit_NK: Tensor, deepest_NK: Tensor, *, temperature: float) -> Tensor:
    """T² · H(deepest, exit), a scalar."""
    deepest_p_NK = softmax(deepest_NK.detach() / temperature, dim=1)
    return -(temperature**2) * (deepest_p_NK * log_softmax(exit_NK / temperature, dim=1)).sum(1).mean()


def exit_features_loss(exit_ND: Tensor, deepest_ND: Tensor) -> Tensor:
    """Squared distance, summed over the embedding and averaged over the batch: a scalar ≥ 0."""
    return (exit_ND - deepest_ND.detach()).square().sum(1).mean()


class SelfDistillation(Objective):
    """The objective: an exit beside the deepest classifier of the same network."""

    def __init__(self, options: Byot, setting: Setting) -> None:
        super().__init__()
        assert setting.temperature is not None, "resolve() gives every softened method its temperature"
        self.temperature, self.hint_weight = setting.temperature, options.hint_weight

    def forward(self, lesson: Lesson) -> Tensor:
        logits = exit_logits_loss(lesson.student.logits, lesson.teacher.logits, temperature=self.temperature)
        features = exit_features_loss(lesson.student.taps[EMBEDDING], lesson.teacher.taps[EMBEDDING])
        return logits + self.hint_weight * features


from_options = SelfDistillation
