import math

import pytest
import torch
from torch import nn

from kdcore.objectives.nkd import NormalizedKd, nkd_loss
from kdcore.spec.methods.response import Nkd
from tests.kdcore.objectives.lessons import labels, lesson, normal, setting


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * normal(*shape, seed=seed)


def naive(student, teacher, right, gamma, temperature) -> float:
    def softmax(z: list[float]) -> list[float]:
        powers = [math.exp(value) for value in z]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), right.tolist(), strict=True):
        total -= softmax(t)[y] * math.log(softmax(s)[y])
        rest_s, rest_t = (softmax([v / temperature for k, v in enumerate(z) if k != y]) for z in (s, t))
        total -= gamma * temperature**2 * sum(a * math.log(b) for a, b in zip(rest_t, rest_s, strict=True))
    return total / len(student)


def test_nkd_loss_equals_a_value_computed_by_hand():
    """At label 0 the teacher's p is (1/2, 3/8, 1/8), the student's (1/3, 1/3, 1/3).

    Among the others, at λ = 2, the teacher's logits are ln 3 / 2 apart: q is (√3, 1) / (1 + √3) against (1/2, 1/2).
    """
    student, teacher = torch.zeros(1, 3), torch.tensor([[4.0, 3.0, 1.0]]).log()
    by_hand = 0.5 * math.log(3) + 1.5 * 4 * math.log(2)
    assert nkd_loss(student, teacher, torch.tensor([0]), gamma=1.5, temperature=2).item() == pytest.approx(by_hand)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (3, 2), (1, 5), (7, 3), (6, 11)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_loss_equals_the_formula_term_by_term(n, classes, temperature):
    student, teacher, right = logits(n, classes), logits(n, classes, seed=1), labels(n, classes)
    value = nkd_loss(student, teacher, right, gamma=1.5, temperature=temperature)
    assert value.item() == pytest.approx(naive(student, teacher, right, 1.5, temperature), rel=1e-9)


def test_nkd_loss_of_the_target_does_not_depend_on_the_temperature():
    student, teacher, right = logits(4, 5), logits(4, 5, seed=1), labels(4, 5)
    cold, hot = (nkd_loss(student, teacher, right, gamma=0, temperature=t) for t in (1, 8))
    assert cold.item() == hot.item()


def test_nkd_loss_of_the_others_does_not_depend_on_the_label():
    """The label is not in the softmax of the others, on either side."""
    student, teacher, right = logits(4, 5), logits(4, 5, seed=1), labels(4, 5)

    def others(student: torch.Tensor, teacher: torch.Tensor) -> float:
        with_others, without = (nkd_loss(student, teacher, right, gamma=g, temperature=2) for g in (1, 0))
        return (with_others - without).item()

    plain, larger = others(student, teacher), torch.zeros(4, 5).scatter_(1, right[:, None], 6.0)
    assert others(student + larger, teacher - larger) == pytest.approx(plain, rel=1e-9)


def test_nkd_loss_of_equal_sides_has_the_gradient_of_the_target_only():
    """The others' part is at its minimum; the target's gradient at s_y is -t_y (1 - s_y)."""
    same, right = logits(5, 4).requires_grad_(), labels(5, 4)
    nkd_loss(same, same.detach(), right, gamma=1.5, temperature=1).backward()
    p = torch.softmax(same.detach(), 1)
    target_p = p.gather(1, right[:, None])
    by_hand = target_p * (p - nn.functional.one_hot(right, 4)) / 5
    assert torch.allclose(same.grad, by_hand, atol=1e-12)


def test_nkd_loss_of_two_classes_has_no_part_of_the_others():
    student, teacher, right = logits(4, 2), logits(4, 2, seed=1), labels(4, 2)
    assert nkd_loss(student, teacher, right, gamma=9).item() == nkd_loss(student, teacher, right, gamma=0).item()


def test_normalized_kd_is_the_loss_of_its_options():
    student, teacher, right = logits(6, 5), logits(6, 5, seed=1), labels(6, 5)
    by_hand = nkd_loss(student, teacher, right, gamma=3.5, temperature=3)
    objective = NormalizedKd(Nkd(gamma=3.5), setting(temperature=3.0))
    assert objective(lesson(student, teacher, labels=right)).item() == by_hand.item()
