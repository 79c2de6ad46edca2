import math

import pytest
import torch

from kdcore.objectives.dkd import DecoupledKd, dkd_loss
from kdcore.objectives.kd import kd_kl_loss
from kdcore.spec.methods.response import Dkd
from tests.kdcore.objectives.lessons import labels, lesson, normal, setting


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * normal(*shape, seed=seed)


def naive(student, teacher, right, temperature, target_weight, non_target_weight) -> float:
    """The two divergences term by term, as sections 3.1 and 3.3 define them."""

    def parts(z: list[float], y: int) -> tuple[list[float], list[float]]:
        powers = [math.exp(value / temperature) for value in z]
        p, others = powers[y] / sum(powers), [power for k, power in enumerate(powers) if k != y]
        return [p, 1 - p], [power / sum(others) for power in others]

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), right.tolist(), strict=True):
        (target_s, rest_s), (target_t, rest_t) = parts(s, y), parts(t, y)
        total += target_weight * kl(target_t, target_s) + non_target_weight * kl(rest_t, rest_s)
    return temperature**2 * total / len(student)


def test_dkd_loss_equals_a_value_computed_by_hand():
    """At T = 1 and label 0 the teacher's p is (1/2, 3/8, 1/8), the student's (1/3, 1/3, 1/3).

    So b is (1/2, 1/2) against (1/3, 2/3), and q is (3/4, 1/4) against (1/2, 1/2).
    """
    student, teacher = torch.zeros(1, 3), torch.tensor([[4.0, 3.0, 1.0]]).log()
    target = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    others = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    value = dkd_loss(student, teacher, torch.tensor([0]), temperature=1, target_weight=2, non_target_weight=5)
    assert value.item() == pytest.approx(2 * target + 5 * others)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (3, 2), (1, 5), (7, 3), (6, 11)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_loss_equals_the_two_divergences_term_by_term(n, classes, temperature):
    student, teacher, right = logits(n, classes), logits(n, classes, seed=1), labels(n, classes)
    value = dkd_loss(student, teacher, right, temperature=temperature, target_weight=1.5, non_target_weight=8.0)
    assert value.item() == pytest.approx(naive(student, teacher, right, temperature, 1.5, 8.0), rel=1e-9)


def test_dkd_loss_of_one_sample_is_kd_if_the_others_have_the_teachers_weight():
    """Section 3.1: KD = KL(b_t ‖ b_s) + (1 - p_t,y) · KL(q_t ‖ q_s)."""
    student, teacher, right = logits(1, 6), logits(1, 6, seed=1), torch.tensor([4])
    others = 1 - torch.softmax(teacher / 4, 1)[0, 4].item()
    value = dkd_loss(student, teacher, right, temperature=4, target_weight=1, non_target_weight=others)
    assert value.item() == pytest.approx(kd_kl_loss(student, teacher, temperature=4).item(), rel=1e-12)


def test_dkd_loss_of_two_classes_has_no_part_of_the_others():
    student, teacher, right = logits(4, 2).requires_grad_(), logits(4, 2, seed=1), labels(4, 2)
    value = dkd_loss(student, teacher, right, temperature=4, target_weight=0, non_target_weight=8)
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("confident_of", [0, 1], ids=["right", "wrong"])
def test_dkd_loss_is_exact_for_a_student_more_confident_than_float32_can_express(confident_of):
    """p_y or 1 - p_y is e^-200: 0 in float32, and its logarithm -inf."""
    student = torch.zeros(1, 3)
    student[0, confident_of] = 200
    teacher, right = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([0])
    student.requires_grad_()
    value = dkd_loss(student, teacher, right, temperature=1)
    value.backward()
    exactly = dkd_loss(student.detach().double(), teacher.double(), right, temperature=1)
    assert value.item() == pytest.approx(exactly.item(), rel=1e-5)
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("warmup", "epoch", "factor"), [(20, 0, 0.05), (20, 9, 0.5), (20, 19, 1), (20, 199, 1), (0, 0, 1), (1, 0, 1)]
)
def test_decoupled_kd_is_the_loss_of_its_options_and_grows_over_the_warmup(warmup, epoch, factor):
    student, teacher, right = logits(6, 5), logits(6, 5, seed=1), labels(6, 5)
    by_hand = dkd_loss(student, teacher, right, temperature=4, target_weight=0.5, non_target_weight=6).item()
    options = Dkd(target_weight=0.5, non_target_weight=6, warmup_epochs=warmup)
    objective = DecoupledKd(options, setting(temperature=4.0))
    value = objective(lesson(student, teacher, labels=right, epoch=epoch)).item()
    assert value == pytest.approx(factor * by_hand)
