import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcore.objectives.rkd import RelationalKd, rkd_angle_loss, rkd_distance_loss
from kdcore.spec.methods.relations import Rkd
from tests.kdcore.objectives.lessons import SETTING, lesson, normal

# The student has three images on a line at 0, 1 and 3, the teacher at the corners of an equilateral triangle.
LINE, TRIANGLE = torch.tensor([[0.0], [1.0], [3.0]]), torch.eye(3)


def test_rkd_distance_loss_equals_a_value_computed_by_hand():
    """Distances 1, 3, 2 have mean 2: 1/2, 3/2, 1. The triangle's are all 1. Two pairs, counted from both ends, differ
    by 1/2, which costs 1/8 each."""
    assert rkd_distance_loss(LINE, TRIANGLE).item() == pytest.approx(4 / 8 / 9)


def test_rkd_angle_loss_equals_a_value_computed_by_hand():
    """On the line the cosines are 1 at both ends and -1 in the middle, in the triangle 1/2. Differences of 1/2 cost
    1/8, that of 3/2 costs 1; each angle is counted from both sides."""
    assert rkd_angle_loss(LINE, TRIANGLE).item() == pytest.approx(2 * (1 / 8 + 1 + 1 / 8) / 27)


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) < 1 else abs(error) - 0.5


def naive_distance_loss(student: torch.Tensor, teacher: torch.Tensor) -> float:
    def relative(x: list[list[float]]) -> list[float]:
        distances = [math.dist(a, b) for a in x for b in x]
        positive = [d for d in distances if d > 0]
        return [d / (sum(positive) / len(positive)) for d in distances]

    pairs = list(zip(relative(student.tolist()), relative(teacher.tolist()), strict=True))
    return sum(huber(s - t) for s, t in pairs) / len(pairs)


def naive_angle_loss(student: torch.Tensor, teacher: torch.Tensor) -> float:
    def cosines(x: list[list[float]]) -> list[float]:
        def direction(a: list[float], b: list[float]) -> list[float]:
            return [(p - q) / (math.dist(a, b) or 1) for p, q in zip(a, b, strict=True)]

        return [
            sum(p * q for p, q in zip(direction(x_i, x_j), direction(x_k, x_j), strict=True))
            for x_j in x
            for x_i in x
            for x_k in x
        ]

    triplets = list(zip(cosines(student.tolist()), cosines(teacher.tolist()), strict=True))
    return sum(huber(s - t) for s, t in triplets) / len(triplets)


NAIVE = {rkd_distance_loss: naive_distance_loss, rkd_angle_loss: naive_angle_loss}
both_losses = pytest.mark.parametrize("loss", NAIVE)
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@both_losses
@pytest.mark.parametrize(("n", "width", "other"), [(2, 1, 1), (3, 5, 2), (7, 4, 9)])
def test_rkd_losses_equal_plain_loops(loss, n, width, other):
    student, teacher = normal(n, width), normal(n, other, seed=1)
    assert loss(student, teacher).item() == pytest.approx(NAIVE[loss](student, teacher), abs=1e-12, rel=1e-9)


def far_from_the_origin(student: torch.Tensor) -> torch.Tensor:
    return student + 100


def in_tight_clusters(student: torch.Tensor) -> torch.Tensor:
    return student / 1000 + normal(3, student.shape[1], seed=2)[torch.arange(len(student)) % 3]


@both_losses
@pytest.mark.parametrize("placed", [torch.relu, far_from_the_origin, in_tight_clusters])
def test_rkd_losses_have_five_digits_of_value_and_gradient_in_float32(loss, placed):
    student, teacher = placed(normal(12, 8)).float(), normal(12, 8, seed=1).float()
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    loss(student, teacher).backward()
    loss(exact, teacher.double()).backward()
    assert loss(student, teacher).item() == pytest.approx(NAIVE[loss](student, teacher), rel=1e-5)
    assert (student.grad - exact.grad).norm().item() < 1e-4 * exact.grad.norm().item()


@both_losses
def test_rkd_losses_do_not_depend_on_rotation_shift_and_scale(loss):
    teacher = normal(6, 4)
    rotation, _ = torch.linalg.qr(normal(4, 4, seed=1))
    assert loss(3 * teacher @ rotation + 5, teacher).item() == pytest.approx(0, abs=1e-12)


@both_precisions
@both_losses
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (normal(1, 4), normal(1, 6, seed=1)),
        (normal(1, 4).repeat(6, 1), normal(1, 3, seed=1).repeat(6, 1)),
        (torch.zeros(5, 4), torch.zeros(5, 4)),
    ],
    ids=["batch of one", "equal samples on both sides", "zeros"],
)
def test_rkd_losses_without_a_relation_are_zero_without_gradient(loss, student, teacher, dtype):
    student = student.to(dtype, copy=True).requires_grad_()
    value = loss(student, teacher.to(dtype))
    value.backward()
    assert value.item() == 0 and student.grad.count_nonzero() == 0


@both_losses
def test_rkd_losses_of_equal_samples_of_the_student_alone_are_above_zero_without_gradient(loss):
    student = torch.ones(4, 3, requires_grad=True)
    value = loss(student, normal(4, 3, dtype=torch.float32))
    value.backward()
    assert value.item() > 0.1 and student.grad.count_nonzero() == 0


def test_rkd_angle_loss_of_two_samples_is_zero():
    student = normal(2, 4).requires_grad_()
    value = rkd_angle_loss(student, normal(2, 4, seed=1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and student.grad.abs().max() < 1e-12


@both_precisions
@both_losses
def test_rkd_losses_leave_equal_samples_out_of_the_mean(loss, dtype):
    student, teacher = normal(5, 3).to(dtype), normal(5, 3, seed=1).to(dtype)
    student[3], teacher[1] = student[0], teacher[2]
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(NAIVE[loss](student, teacher), rel=1e-5)
    assert student.grad.isfinite().all() and student.grad.norm() < 10


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple) else (results,):
            self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return results


@both_losses
def test_rkd_losses_make_no_tensor_of_the_difference_of_every_pair(loss):
    student, teacher = normal(4, 1000).requires_grad_(), normal(4, 1000, seed=1)
    with Largest() as largest:
        loss(student, teacher).backward()
    assert largest.size == student.numel()


def test_relational_kd_weighs_both_losses():
    views = normal(4, 4), normal(4, 7, seed=1)
    objective = RelationalKd(Rkd(tap="fc@in", distance_weight=3, angle_weight=7), SETTING)
    by_hand = 3 * rkd_distance_loss(*views) + 7 * rkd_angle_loss(*views)
    assert objective(lesson(*({"fc@in": view} for view in views))).item() == pytest.approx(by_hand.item())
    assert set(objective.observed) == {"rkd/distance", "rkd/angle"}
