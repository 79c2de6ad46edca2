"""Self-distillation: an early exit learns from the logits and features of the deepest classifier of its own network.

Zhang et al., "Be Your Own Teacher", ICCV 2019, arXiv:1905.08094, section 3.2, losses 2 and 3:

    T² · 1/N Σ_n Σ_k - p_deep log p_exit  +  w · 1/N Σ_n ‖f_exit - f_deep‖²        p = softmax(z / T)

The paper weighs the first term by its alpha and the second by its lambda. Here the job's beta is the paper's alpha, and
beta · w is its lambda. The job's alpha weighs the labels' loss at all exits, the deepest included, as 1 - alpha does in
the public port; in the paper the deepest exit has weight 1.
The port sums the squared distances over the batch too, with lambda 1e-6 for batches of 128. w = 1e-6 · 128 / 0.1 gives
the same value if all features are ≥ 0. The port leaves out elements whose two features are both ≤ 0; here they count.
Deep logits and features are held fixed. Shapes: N batch, K classes, D width of the embedding.
"""

from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from kdcore.lesson import EMBEDDING, Lesson
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.pairs import embeddings
from kdcore.spec.methods.schemes import Byot
from kdcore.spec.vocabulary import Pair

_FEATURES = Pair(student=EMBEDDING, teacher=EMBEDDING)


def exit_logits_loss(exit_NK: Tensor, deepest_NK: Tensor, *, temperature: float) -> Tensor:
    """T² · cross-entropy of the exit with the deepest classifier's probabilities. Returns a scalar ≥ 0."""
    deepest_p_NK = softmax(deepest_NK.detach() / temperature, dim=1)
    return -(temperature**2) * (deepest_p_NK * log_softmax(exit_NK / temperature, dim=1)).sum(1).mean()


def exit_features_loss(exit_ND: Tensor, deepest_ND: Tensor) -> Tensor:
    """Squared distance, summed over the embedding and averaged over the batch. Returns a scalar ≥ 0."""
    return (exit_ND - deepest_ND.detach()).square().sum(1).mean()


class SelfDistillation(Objective):
    """Objective that compares an exit with the deepest classifier of the same network."""

    def __init__(self, options: Byot, setting: Setting) -> None:
        super().__init__()
        assert setting.temperature is not None, "resolve() gives every softened method its temperature"
        self.temperature, self.hint_weight = setting.temperature, options.hint_weight

    def forward(self, lesson: Lesson) -> Tensor:
        logits_loss = exit_logits_loss(*lesson.logits, temperature=self.temperature)
        features_loss = exit_features_loss(*embeddings(lesson, _FEATURES))
        return logits_loss + self.hint_weight * features_loss
