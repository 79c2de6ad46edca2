import copy
import math

import pytest
import torch
from torch import nn

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.dist import CorrelationKd, dist_loss, pearson_distance
from kdcore.objectives.objective import Setting
from kdcore.spec.methods.response import Dist


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def objective(**weights: float) -> CorrelationKd:
    nobody = torch.empty(0, dtype=torch.int64)
    return CorrelationKd(Dist(**weights), Setting(4.0, 5, 240, nobody, nobody))


def lesson(student: torch.Tensor, teacher: torch.Tensor) -> Lesson:
    return Lesson(View(student), View(teacher), Batch(torch.empty(0), torch.empty(0), torch.empty(0)))


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


def test_between_classes_worked_out_by_hand():
    """Rows 0 and 1 agree. Row 2, centred and times 3: (-2, -2, 4) and (1, -2, 1), ρ = 6 / √(24 · 6) = 1/2."""
    value = dist_loss(STUDENT, TEACHER, temperature=1, between_weight=1, within_weight=0)
    assert value.item() == pytest.approx(0.5 / 3, abs=1e-5)


def test_within_a_class_worked_out_by_hand():
    """Columns 1 and 2 rise and fall together. Column 0, centred: (4, -2, -2) / 3 and (1, -1, 0), ρ = 6 / √(24 · 2)."""
    value = dist_loss(STUDENT, TEACHER, temperature=1, between_weight=0, within_weight=1)
    assert value.item() == pytest.approx((1 - 3**0.5 / 2) / 3, abs=1e-5)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (2, 2), (1, 5), (7, 3), (6, 11)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_agrees_with_the_formula_row_by_row(n, classes, temperature):
    student, teacher = logits(n, classes), logits(n, classes, seed=1)
    by_hand = naive(student, teacher, temperature, 2.0, 0.5)
    options = {"temperature": temperature, "between_weight": 2.0, "within_weight": 0.5}
    assert dist_loss(student, teacher, **options).item() == pytest.approx(by_hand, rel=1e-9)
    assert dist_loss(student.float(), teacher.float(), **options).item() == pytest.approx(by_hand, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (1, 5), (4, 2)], ids=["batch", "batch of one", "two classes"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(shape):
    same = logits(*shape).requires_grad_()
    value = dist_loss(same, same.detach(), temperature=1)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert same.grad.abs().max().item() == pytest.approx(0, abs=1e-5)


def test_probabilities_that_rise_and_fall_with_the_teachers_are_right_whatever_their_scale():
    rows = logits(4, 6)
    assert pearson_distance(0.3 * rows + 2, rows).abs().max().item() == pytest.approx(0, abs=1e-7)
    assert (pearson_distance(-rows, rows) - 2).abs().max().item() == pytest.approx(0, abs=1e-7)


def test_a_batch_of_one_compares_classes_and_no_samples():
    student, teacher = logits(1, 6).requires_grad_(), logits(1, 6, seed=1)
    within = dist_loss(student, teacher, temperature=2, between_weight=0)
    within.backward()
    assert within.item() == 0 and student.grad.abs().max() == 0
    assert dist_loss(student, teacher, temperature=2, within_weight=0) > 0.1


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3])
def test_a_teacher_that_does_not_vary_teaches_nothing(constant):
    student = logits(3, 7, dtype=torch.float32).requires_grad_()
    distance = pearson_distance(student, torch.full((3, 7), constant))
    distance.sum().backward()
    assert distance.abs().max() == 0 and student.grad.abs().max() == 0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3])
def test_a_student_that_does_not_vary_is_drawn_to_its_teacher_by_a_gradient_of_length_one(constant):
    student, teacher = torch.full((3, 7), constant, requires_grad=True), logits(3, 7, dtype=torch.float32)
    distance = pearson_distance(student, teacher)
    distance.sum().backward()
    assert distance.tolist() == [1, 1, 1]
    centred = teacher - teacher.mean(1, keepdim=True)
    assert torch.allclose(student.grad, -centred / centred.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4, 3)], ids=["wide", "batch of one", "tall"])
def test_the_gradient_is_that_of_the_value(shape):
    student, teacher = logits(*shape).requires_grad_(), logits(*shape, seed=1)
    assert torch.autograd.gradcheck(lambda s: dist_loss(s, teacher, temperature=2, between_weight=0.5), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("of_student", "of_teacher"), [(1, 1), (0, 1), (1, 0), (0, 0), (1e4, 1), (1, 1e4), (1e4, 1e4)])
@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (1, 5), (6, 5)], ids=lambda shape: "x".join(map(str, shape)))
def test_value_and_gradient_are_finite_and_reach_the_student_alone(shape, of_student, of_teacher, dtype):
    """Logits of 1e4 make probabilities of exactly 0 and 1, logits of 0 equal ones."""
    student = (of_student * logits(*shape, dtype=dtype)).requires_grad_()
    teacher = (of_teacher * logits(*shape, seed=1, dtype=dtype)).requires_grad_()
    value = dist_loss(student, teacher, temperature=1)
    value.backward()
    assert value.shape == () and value.dtype == dtype and value.isfinite()
    assert student.grad.isfinite().all() and student.grad.abs().max() < 10 and teacher.grad is None


def test_the_objective_is_the_loss_of_its_options():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    by_hand = dist_loss(student, teacher, temperature=4, between_weight=0.5, within_weight=3)
    compare = objective(between_weight=0.5, within_weight=3)
    assert compare(lesson(student, teacher)).item() == by_hand.item()


def test_two_steps_change_the_student_and_nothing_of_the_teacher():
    torch.manual_seed(0)
    student, teacher, inputs = nn.Linear(5, 4), nn.Linear(5, 4), torch.randn(8, 5)
    before, compare = copy.deepcopy((student, teacher)), objective()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        compare(lesson(student(inputs), teacher(inputs).detach())).backward()
        optimizer.step()
    assert not torch.equal(student.weight, before[0].weight) and not torch.equal(student.bias, before[0].bias)
    assert torch.equal(teacher.weight, before[1].weight) and torch.equal(teacher.bias, before[1].bias)
    assert not [*compare.parameters()] and not compare.state_dict()
