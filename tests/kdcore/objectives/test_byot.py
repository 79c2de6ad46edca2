import math

import pytest
import torch

from kdcore.lesson import EMBEDDING, Batch, Lesson, View
from kdcore.objectives import Setting, build
from kdcore.objectives.byot import exit_features_loss, exit_logits_loss
from kdcore.spec.methods.schemes import Byot


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_logits_loss_worked_out_by_hand():
    """T = 2: logits 2 log 3 and 0 soften to 3/4, 1/4; the exit says 1/2, 1/2. T² times the cross-entropy, log 2."""
    deepest = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    assert exit_logits_loss(torch.zeros_like(deepest), deepest, temperature=2).item() == pytest.approx(4 * math.log(2))


def test_of_equal_logits_what_is_left_is_the_entropy():
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert exit_logits_loss(logits, logits, temperature=1).item() == pytest.approx(entropy)


def test_the_features_loss_sums_over_the_embedding_and_averages_over_the_batch():
    """(1 + 4) and (9 + 0), over two images."""
    deepest = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64)
    assert exit_features_loss(torch.zeros_like(deepest), deepest).item() == pytest.approx(7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("batch", "classes"), [(1, 2), (5, 3), (4, 10)])
def test_it_is_what_a_naive_loop_makes_of_the_formula(batch, classes, dtype, tolerance):
    exit_NK, deepest_NK = randn(batch, classes, seed=0, dtype=dtype), randn(batch, classes, seed=1, dtype=dtype)
    total = 0.0
    for student, teacher in zip(exit_NK.tolist(), deepest_NK.tolist(), strict=True):
        softened = [math.exp(z / 3) for z in teacher]
        normaliser = math.log(sum(math.exp(z / 3) for z in student))
        total -= sum(p / sum(softened) * (z / 3 - normaliser) for p, z in zip(softened, student, strict=True))
    assert exit_logits_loss(exit_NK, deepest_NK, temperature=3).item() == pytest.approx(
        9 * total / batch, rel=tolerance
    )
    squares = sum((a - b) ** 2 for a, b in zip(exit_NK.flatten().tolist(), deepest_NK.flatten().tolist(), strict=True))
    assert exit_features_loss(exit_NK, deepest_NK).item() == pytest.approx(squares / batch, rel=tolerance)


def test_gradients_reach_the_exit_and_never_the_deepest():
    exit_NK, deepest_NK = randn(3, 4, seed=0).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    (exit_logits_loss(exit_NK, deepest_NK, temperature=3) + exit_features_loss(exit_NK, deepest_NK)).backward()
    assert exit_NK.grad.abs().sum() > 0 and deepest_NK.grad is None
    assert torch.autograd.gradcheck(lambda z: exit_logits_loss(z, deepest_NK, temperature=3), exit_NK)
    assert torch.autograd.gradcheck(lambda f: exit_features_loss(f, deepest_NK), exit_NK)


def test_all_zero_views_give_finite_values_and_gradients():
    zero = torch.zeros(1, 3, requires_grad=True)
    loss = exit_logits_loss(zero, torch.zeros(1, 3), temperature=3) + exit_features_loss(zero, torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == pytest.approx(9 * math.log(3)) and zero.grad.abs().max() < 1e-6


def test_the_objective_adds_features_by_their_weight_and_owns_nothing():
    setting = Setting(3.0, num_classes=4, epochs=1, labels=torch.zeros(2).long(), rows=torch.arange(2))
    objective = build((Byot(hint_weight=0.5),), setting)[-1]
    views = [View(randn(2, 4, seed=seed), {EMBEDDING: randn(2, 6, seed=seed + 2)}) for seed in range(2)]
    lesson = Lesson(*views, Batch(torch.empty(0), torch.zeros(2).long(), torch.arange(2)))
    exit, deepest = views
    by_hand = exit_logits_loss(exit.logits, deepest.logits, temperature=3)
    by_hand = by_hand + 0.5 * exit_features_loss(exit.taps[EMBEDDING], deepest.taps[EMBEDDING])
    assert objective(lesson).item() == pytest.approx(by_hand.item())
    assert not list(objective.parameters()) and objective.needs.student_taps == ()


def test_its_default_is_the_port_s_sum_over_batches_of_128():
    """Beta 0.1 times the default weight, averaged over 128 images: lambda 1e-6 on their sum."""
    assert 0.1 * Byot().hint_weight / 128 == pytest.approx(1e-6)
