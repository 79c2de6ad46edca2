import math

import pytest
import torch

from kdcore.objectives.dist import CorrelationKd, dist_loss, pearson_distance
from kdcore.spec.methods.response import Dist
from tests.kdcore.objectives.lessons import lesson, normal, setting


def naive(student, teacher, temperature, between_weight, within_weight) -> float:
    def softmax(z: list[float]) -> list[float]:
        powers = [math.exp(value / temperature) for value in z]
        return [power / sum(powers) for power in powers]

    def distance(a: list[float], b: list[float]) -> float:
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        product = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
        length_a, length_b = math.dist(a, [mean_a] * len(a)), math.dist(b, [mean_b] * len(b))
        return 0 if len(a) == 1 else 1 - product / (length_a * length_b + 1e-8)

    def mean_distance(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(map(distance, a, b)) / len(a)

    rows = [[softmax(z) for z in side.tolist()] for side in (student, teacher)]
    columns = [[list(column) for column in zip(*side, strict=True)] for side in rows]
    return temperature**2 * (between_weight * mean_distance(*rows) + within_weight * mean_distance(*columns))


# Eighths: softmax at T = 1 gives these rows back, divided by 8.
STUDENT = torch.tensor([[4.0, 2.0, 2.0], [2.0, 4.0, 2.0], [2.0, 2.0, 4.0]]).log()
TEACHER = torch.tensor([[4.0, 2.0, 2.0], [2.0, 4.0, 2.0], [3.0, 2.0, 3.0]]).log()


def test_dist_loss_between_classes_equals_a_value_computed_by_hand():
    """Rows 0 and 1 agree. Row 2, centred and times 3: (-2, -2, 4) and (1, -2, 1), ρ = 6 / √(24 · 6) = 1/2."""
    value = dist_loss(STUDENT, TEACHER, temperature=1, between_weight=1, within_weight=0)
    assert value.item() == pytest.approx(0.5 / 3, abs=1e-5)


def test_dist_loss_within_a_class_equals_a_value_computed_by_hand():
    """Columns 1 and 2 correlate fully. Column 0, centred: (4, -2, -2) / 3 and (1, -1, 0), ρ = 6 / √(24 · 2)."""
    value = dist_loss(STUDENT, TEACHER, temperature=1, between_weight=0, within_weight=1)
    assert value.item() == pytest.approx((1 - 3**0.5 / 2) / 3, abs=1e-5)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (2, 2), (1, 5), (7, 3), (6, 11)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_loss_equals_the_formula_row_by_row(n, classes, temperature):
    student, teacher = normal(n, classes), normal(n, classes, seed=1)
    value = dist_loss(student, teacher, temperature=temperature, between_weight=2.0, within_weight=0.5)
    assert value.item() == pytest.approx(naive(student, teacher, temperature, 2.0, 0.5), rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (4, 2)], ids=["batch", "batch of one", "two classes"])
def test_dist_loss_of_equal_sides_is_zero_without_gradient(shape):
    same = normal(*shape).requires_grad_()
    value = dist_loss(same, same.detach(), temperature=1)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert same.grad.abs().max().item() == pytest.approx(0, abs=1e-5)


def test_pearson_distance_does_not_depend_on_scale_and_shift():
    rows = normal(4, 6)
    assert pearson_distance(0.3 * rows + 2, rows).abs().max().item() == pytest.approx(0, abs=1e-7)
    assert (pearson_distance(-rows, rows) - 2).abs().max().item() == pytest.approx(0, abs=1e-7)


def test_dist_loss_of_one_image_compares_its_classes_only():
    student, teacher = normal(1, 6).requires_grad_(), normal(1, 6, seed=1)
    within = dist_loss(student, teacher, temperature=2, between_weight=0)
    within.backward()
    assert within.item() == 0 and student.grad.abs().max() == 0
    assert dist_loss(student, teacher, temperature=2, within_weight=0) > 0.1


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3])
def test_pearson_distance_from_a_constant_teacher_is_zero_without_gradient(constant):
    student = normal(3, 7, dtype=torch.float32).requires_grad_()
    distance = pearson_distance(student, torch.full((3, 7), constant))
    distance.sum().backward()
    assert distance.abs().max() == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3])
def test_pearson_distance_of_a_constant_student_is_one_with_a_gradient_of_length_one(constant):
    student, teacher = torch.full((3, 7), constant, requires_grad=True), normal(3, 7, dtype=torch.float32)
    distance = pearson_distance(student, teacher)
    distance.sum().backward()
    assert distance.tolist() == [1, 1, 1]
    centred = teacher - teacher.mean(1, keepdim=True)
    assert torch.allclose(student.grad, -centred / centred.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("of_student", "of_teacher"), [(1, 1), (0, 1), (1, 0), (0, 0), (1e4, 1), (1, 1e4), (1e4, 1e4)])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (1, 5), (6, 5)], ids=str)
def test_dist_loss_has_a_small_gradient_at_any_scale(shape, of_student, of_teacher, dtype):
    """Logits of 1e4 make probabilities of exactly 0 and 1, logits of 0 equal ones."""
    student = (of_student * normal(*shape, dtype=dtype)).requires_grad_()
    value = dist_loss(student, of_teacher * normal(*shape, seed=1, dtype=dtype), temperature=1)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 10


def test_correlation_kd_is_the_loss_of_its_options():
    """T² included."""
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    by_hand = dist_loss(student, teacher, temperature=4, between_weight=0.5, within_weight=3)
    objective = CorrelationKd(Dist(between_weight=0.5, within_weight=3), setting(temperature=4.0))
    assert objective(lesson(student, teacher)).item() == by_hand.item()
