import math

import pytest
import torch

from kdcore.objectives.pkt import ProbabilisticTransfer, pkt_loss
from kdcore.spec.methods.relations import Pkt
from tests.kdcore.objectives.lessons import SETTING, lesson, normal


def test_pkt_loss_equals_a_value_computed_by_hand():
    """Two equal vectors are as similar as a vector to itself, p = (1/2, 1/2); two orthogonal ones half as similar,
    q = (2/3, 1/3). Both rows cost log(3/4)/2 + log(3/2)/2, and the sum is divided by 2²."""
    student, teacher = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    by_hand = 2 * (math.log(3 / 4) / 2 + math.log(3 / 2) / 2) / 4
    assert pkt_loss(student, teacher).item() == pytest.approx(by_hand, abs=1e-6)


def naive(student: torch.Tensor, teacher: torch.Tensor) -> float:
    def neighbours(x: list[list[float]]) -> list[float]:
        unit = [[value / (math.hypot(*row) + 1e-7) for value in row] for row in x]
        kernel = [[(sum(p * q for p, q in zip(a, b, strict=True)) + 1) / 2 for b in unit] for a in unit]
        return [value / sum(row) for row in kernel for value in row]

    pairs = list(zip(neighbours(student.tolist()), neighbours(teacher.tolist()), strict=True))
    return sum(t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in pairs) / len(pairs)


@pytest.mark.parametrize(("n", "width", "other"), [(2, 2, 3), (5, 4, 4), (9, 3, 7)])
def test_pkt_loss_equals_plain_loops(n, width, other):
    student, teacher = normal(n, width), normal(n, other, seed=1)
    assert pkt_loss(student, teacher).item() == pytest.approx(naive(student, teacher), rel=1e-9)


def test_pkt_loss_of_a_scaled_teacher_is_zero():
    """Except for ε."""
    teacher = normal(6, 4)
    assert pkt_loss(7 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_pkt_loss_of_one_image_is_zero_without_gradient():
    student = normal(1, 4).requires_grad_()
    value = pkt_loss(student, normal(1, 6, seed=1))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() < 1e-12


def test_pkt_loss_sends_a_large_gradient_to_a_vector_of_zeros_beside_others():
    """In the order of 1/ε, as the authors' formula has it; none if all vectors are zero."""
    student, teacher = normal(4, 3), normal(4, 5, seed=1)
    student[1] = 0
    student.requires_grad_()
    pkt_loss(student, teacher).backward()
    of_rows = student.grad.norm(dim=1).tolist()
    assert 1e3 < of_rows.pop(1) < 1e7 and max(of_rows) < 1
    zeros = torch.zeros(4, 3, requires_grad=True)
    pkt_loss(zeros, teacher.float()).backward()
    assert not zeros.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_pkt_loss_is_finite_on_opposite_vectors(side, dtype):
    """Their similarity of 0 may round to less, of which there is no logarithm."""
    opposite, other = torch.cat([normal(3, 300), -normal(3, 300)]).to(dtype), normal(6, 5).to(dtype)
    student, teacher = (opposite, other) if side == "student" else (other, opposite)
    student.requires_grad_()
    value = pkt_loss(student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def test_probabilistic_transfer_compares_the_embeddings_of_its_tap():
    student, teacher = normal(3, 4), normal(3, 7, seed=1)
    objective = ProbabilisticTransfer(Pkt(tap="fc@in"), SETTING)
    value = objective(lesson({"fc@in": student}, {"fc@in": teacher}))
    assert value.item() == pkt_loss(student, teacher).item() > 0 and not objective.state_dict()
