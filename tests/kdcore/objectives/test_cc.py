import math
from itertools import pairwise

import pytest
import torch

from kdcore.objectives.cc import CorrelationCongruence, cc_gaussian_loss, cc_pairs_loss
from kdcore.spec.methods.relations import Cc
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters


def test_cc_pairs_loss_equals_a_value_computed_by_hand():
    """Errors (1, 2), (3, 0), (2, 5): neighbours give 3 + 0 and 6 + 0, over two pairs."""
    student = torch.tensor([[1.0, -2.0], [3.0, 1.0], [0.0, 5.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert cc_pairs_loss(student, teacher).item() == (3 + 6) / 2


def test_cc_gaussian_loss_equals_a_value_computed_by_hand():
    """The student's two vectors are orthogonal (kernel exp(-2γ)), the teacher's are equal (kernel
    exp(-2γ) · (1 + 2γ + (2γ)²/2)): with γ = 1/2 they differ by 3/2 · exp(-1), off the diagonal only."""
    student, teacher = 3 * torch.eye(2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64)
    by_hand = 2 * (1.5 * math.exp(-1)) ** 2 / 4
    assert cc_gaussian_loss(student, teacher, gamma=0.5, order=2).item() == pytest.approx(by_hand)


def naive_pairs(student: torch.Tensor, teacher: torch.Tensor) -> float:
    errors = [
        [abs(s - t) for s, t in zip(*rows, strict=True)]
        for rows in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    products = [sum(p * q for p, q in zip(*pair, strict=True)) for pair in pairwise(errors)]
    return sum(products) / len(products)


def naive_gaussian(student: torch.Tensor, teacher: torch.Tensor, gamma: float = 0.4, order: int = 2) -> float:
    def kernel(x: list[list[float]]) -> list[float]:
        unit = [[value / math.hypot(*row) for value in row] for row in x]
        cosines = [sum(p * q for p, q in zip(a, b, strict=True)) for a in unit for b in unit]
        return [
            math.exp(-2 * gamma) * sum((2 * gamma * cosine) ** p / math.factorial(p) for p in range(order + 1))
            for cosine in cosines
        ]

    pairs = list(zip(kernel(student.tolist()), kernel(teacher.tolist()), strict=True))
    return sum((s - t) ** 2 for s, t in pairs) / len(pairs)


@pytest.mark.parametrize(("loss", "naive"), [(cc_pairs_loss, naive_pairs), (cc_gaussian_loss, naive_gaussian)])
@pytest.mark.parametrize(("n", "width"), [(2, 1), (5, 4), (8, 3)])
def test_cc_losses_equal_plain_loops(loss, naive, n, width):
    student, teacher = normal(n, width), normal(n, width, seed=1)
    assert loss(student, teacher).item() == pytest.approx(naive(student, teacher), rel=1e-9)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_cc_gaussian_loss_accepts_any_order_and_gamma(order):
    student, teacher = normal(4, 3), normal(4, 3, seed=1)
    by_loops = naive_gaussian(student, teacher, gamma=1.3, order=order)
    assert cc_gaussian_loss(student, teacher, gamma=1.3, order=order).item() == pytest.approx(by_loops, rel=1e-9)


def test_cc_gaussian_loss_of_a_long_series_is_that_of_the_rbf_kernel():
    student, teacher = normal(4, 3), normal(4, 3, seed=1)

    def kernel(x: torch.Tensor) -> torch.Tensor:
        unit = x / x.norm(dim=1, keepdim=True)
        return torch.exp(-0.4 * (unit[:, None] - unit).square().sum(2))

    exact = (kernel(student) - kernel(teacher)).square().mean()
    assert cc_gaussian_loss(student, teacher, order=12).item() == pytest.approx(exact.item(), rel=1e-6)


def test_cc_gaussian_loss_is_a_mean_over_all_pairs():
    student, teacher = normal(4, 3), normal(4, 3, seed=1)
    once = cc_gaussian_loss(student, teacher).item()
    assert cc_gaussian_loss(student.repeat(2, 1), teacher.repeat(2, 1)).item() == pytest.approx(once)


@pytest.mark.parametrize("loss", [cc_pairs_loss, cc_gaussian_loss])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [(normal(1, 4), normal(1, 4, seed=1)), (normal(5, 4), normal(5, 4)), (torch.zeros(3, 2), torch.zeros(3, 2))],
    ids=["batch of one", "equal sides", "zeros"],
)
def test_cc_losses_without_a_difference_are_zero_without_gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-15) and student.grad.abs().max() < 1e-12


def test_cc_gaussian_loss_of_one_image_is_above_zero_if_one_embedding_is_zero():
    assert cc_gaussian_loss(torch.zeros(1, 4), normal(1, 4).float()).item() > 0.1


def test_cc_gaussian_loss_sends_no_gradient_to_an_embedding_of_zeros():
    student = normal(3, 2)
    student[1] = 0
    student.requires_grad_()
    cc_gaussian_loss(student, normal(3, 2, seed=1)).backward()
    assert not student.grad[1].any() and student.grad[0].any() and student.grad.norm() < 10


@pytest.mark.parametrize(("form", "loss"), [("pairs", cc_pairs_loss), ("gaussian", cc_gaussian_loss)])
def test_correlation_congruence_compares_linear_embeddings_of_both_sides(form, loss):
    student, teacher = {"fc@in": normal(3, 4)}, {"fc@in": normal(3, 7, seed=1)}
    objective = CorrelationCongruence(Cc(tap="fc@in", form=form, width=5), SETTING)
    built(objective, lesson(student, teacher))
    assert parameters(objective) == (4 + 1) * 5 + (7 + 1) * 5
    embedded = objective.student_embedding(student["fc@in"]), objective.teacher_embedding(teacher["fc@in"])
    assert objective(lesson(student, teacher)).item() == loss(*embedded).item() > 0
