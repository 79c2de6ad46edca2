import math

import pytest
import torch

from kdcore.lesson import EMBEDDING, Batch, Lesson, View
from kdcore.objectives.byot import SelfDistillation, exit_features_loss, exit_logits_loss
from kdcore.spec.methods.schemes import Byot
from tests.kdcore.objectives.lessons import NOTHING, normal, setting


def test_exit_logits_loss_equals_a_value_computed_by_hand():
    """T = 2: logits 2 log 3 and 0 soften to 3/4, 1/4; the exit has 1/2, 1/2. T² times the cross-entropy, log 2."""
    deepest = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    assert exit_logits_loss(torch.zeros_like(deepest), deepest, temperature=2).item() == pytest.approx(4 * math.log(2))


def test_exit_logits_loss_of_equal_logits_is_their_entropy():
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert exit_logits_loss(logits, logits, temperature=1).item() == pytest.approx(entropy)


def test_exit_features_loss_sums_over_the_embedding_and_averages_over_the_batch():
    """(1 + 4) and (9 + 0), over two images."""
    deepest = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    assert exit_features_loss(torch.zeros_like(deepest), deepest).item() == pytest.approx(7)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (5, 3), (4, 10)])
def test_exit_logits_loss_equals_the_formula_term_by_term(n, classes):
    exit_NK, deepest_NK, total = normal(n, classes), normal(n, classes, seed=1), 0.0
    for student, teacher in zip(exit_NK.tolist(), deepest_NK.tolist(), strict=True):
        softened = [math.exp(z / 3) for z in teacher]
        normaliser = math.log(sum(math.exp(z / 3) for z in student))
        total -= sum(p / sum(softened) * (z / 3 - normaliser) for p, z in zip(softened, student, strict=True))
    assert exit_logits_loss(exit_NK, deepest_NK, temperature=3).item() == pytest.approx(9 * total / n, rel=1e-9)


def test_self_distillation_adds_features_by_their_weight():
    objective = SelfDistillation(Byot(hint_weight=0.5), setting(temperature=3.0))
    views = [View(normal(2, 4, seed=seed), {EMBEDDING: normal(2, 6, seed=seed + 2)}) for seed in range(2)]
    exit, deepest = views
    by_hand = exit_logits_loss(exit.logits, deepest.logits, temperature=3)
    by_hand = by_hand + 0.5 * exit_features_loss(exit.taps[EMBEDDING], deepest.taps[EMBEDDING])
    assert objective(Lesson(*views, Batch(NOTHING, NOTHING, NOTHING))).item() == pytest.approx(by_hand.item())


def ports_features_loss(exit_ND: torch.Tensor, deepest_ND: torch.Tensor) -> torch.Tensor:
    """The public port's: elements whose two features are both at or below zero do not count."""
    counted_ND = (exit_ND > 0) | (deepest_ND > 0)
    return ((exit_ND - deepest_ND).square() * counted_ND).sum()


def test_exit_features_loss_is_the_ports_for_features_above_zero_only():
    """The port's lambda 1e-6 on a sum over batches of 128 is beta 0.1 times the default weight on a mean."""
    exit_ND, deepest_ND = normal(128, 6), normal(128, 6, seed=1)
    weight = 0.1 * Byot().hint_weight
    for exit, deepest, equal in ((exit_ND.relu(), deepest_ND.relu(), True), (exit_ND, deepest_ND, False)):
        expected = 1e-6 * ports_features_loss(exit, deepest).item()
        assert (weight * exit_features_loss(exit, deepest).item() == pytest.approx(expected)) == equal
