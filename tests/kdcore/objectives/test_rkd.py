import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcore.objectives.rkd import RelationalKd, rkd_angle_loss, rkd_distance_loss
from kdcore.spec.methods.relations import Rkd
from tests.kdcore.objectives.lessons import maps
from tests.kdcore.objectives.two_networks import BODY, EMBEDDING, SETTING, NoHostReads, Trial

LOSSES = [rkd_distance_loss, rkd_angle_loss]

# The student sees three images on a line at 0, 1 and 3, the teacher the corners of an equilateral triangle.
LINE, TRIANGLE = torch.tensor([[0.0], [1.0], [3.0]]), torch.eye(3)


def test_distance_worked_out_by_hand():
    """Distances 1, 3, 2 have mean 2: 1/2, 3/2, 1. The triangle's are all 1. Two pairs, seen from both ends, miss by
    1/2, which costs 1/8 each."""
    assert rkd_distance_loss(LINE, TRIANGLE).item() == pytest.approx(4 / 8 / 9)


def test_angle_worked_out_by_hand():
    """On the line the cosines are 1 at both ends and -1 in the middle, in the triangle 1/2. Misses of 1/2 cost 1/8,
    that of 3/2 costs 1; each angle is seen from both sides."""
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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("n", "width", "other"), [(2, 1, 1), (3, 5, 2), (7, 4, 9)])
def test_losses_agree_with_plain_loops(loss, n, width, other):
    student, teacher = maps(n, width), maps(n, other, seed=1)
    assert loss(student, teacher).item() == pytest.approx(NAIVE[loss](student, teacher), abs=1e-12, rel=1e-9)


def far_from_the_origin(student: torch.Tensor) -> torch.Tensor:
    return student + 100


def in_tight_clusters(student: torch.Tensor) -> torch.Tensor:
    return student / 1000 + maps(3, student.shape[1], seed=2)[torch.arange(len(student)) % 3]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("placed", [torch.relu, far_from_the_origin, in_tight_clusters])
def test_float32_keeps_five_digits_of_value_and_gradient(loss, placed):
    student, teacher = placed(maps(12, 8)).float(), maps(12, 8, seed=1).float()
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    loss(student, teacher).backward()
    loss(exact, teacher.double()).backward()
    assert loss(student, teacher).item() == pytest.approx(NAIVE[loss](student, teacher), rel=1e-5)
    assert (student.grad - exact.grad).norm().item() < 1e-4 * exact.grad.norm().item()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_right_and_spare_the_teacher(loss):
    student, teacher = maps(5, 3).requires_grad_(), maps(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher.detach()), student)
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_turning_moving_and_scaling_the_embeddings_changes_nothing(loss):
    teacher = maps(6, 4)
    turn, _ = torch.linalg.qr(maps(4, 4, seed=1))
    assert loss(3 * teacher @ turn + 5, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (maps(1, 4), maps(1, 6, seed=1)),
        (maps(1, 4).repeat(6, 1), maps(1, 3, seed=1).repeat(6, 1)),
        (torch.zeros(5, 4), torch.zeros(5, 4)),
    ],
    ids=["batch of one", "equal samples", "zeros"],
)
def test_nothing_to_compare_is_zero_with_a_zero_gradient(loss, student, teacher, dtype):
    student = student.to(dtype, copy=True).requires_grad_()
    value = loss(student, teacher.to(dtype))
    value.backward()
    assert value.item() == 0 and student.grad.count_nonzero() == 0


def test_two_samples_have_no_angle():
    student = maps(2, 4).requires_grad_()
    value = rkd_angle_loss(student, maps(2, 4, seed=1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_samples_that_coincide_are_left_out_of_the_mean_and_get_finite_gradients(loss, dtype):
    student, teacher = maps(5, 3).to(dtype), maps(5, 3, seed=1).to(dtype)
    student[3], teacher[1] = student[0], teacher[2]
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(NAIVE[loss](student, teacher), rel=1e-5)
    assert student.grad.isfinite().all() and student.grad.norm() < 10


@pytest.mark.parametrize("loss", LOSSES)
def test_a_collapsed_student_gets_no_gradient_rather_than_nan(loss):
    student = torch.ones(4, 3, requires_grad=True)
    loss(student, maps(4, 3, dtype=torch.float32)).backward()
    assert student.grad.count_nonzero() == 0


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            self.size = max(self.size, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_holds_the_difference_of_every_pair(loss):
    student, teacher = maps(4, 1000).requires_grad_(), maps(4, 1000, seed=1)
    with Largest() as largest:
        loss(student, teacher).backward()
    assert largest.size == student.numel()


def objective(**options: float) -> RelationalKd:
    return RelationalKd(Rkd(tap=EMBEDDING, **options), SETTING)


def test_the_objective_weighs_both_losses():
    trial = Trial(objective(distance_weight=3, angle_weight=7))
    lesson = trial.lesson([0, 2, 4, 6])
    views = lesson.student.taps["fc@in"], lesson.teacher.taps["head@in"]
    by_hand = 3 * rkd_distance_loss(*views) + 7 * rkd_angle_loss(*views)
    assert trial.objective(lesson).item() == pytest.approx(by_hand.item())
    assert set(trial.objective.observed) == {"rkd/distance", "rkd/angle"}


def test_the_objective_asks_for_embeddings_and_owns_nothing():
    asked = objective()
    assert (asked.needs.student_taps, asked.needs.teacher_taps) == (("fc@in",), ("head@in",))
    assert not list(asked.parameters()) and not asked.state_dict()


def test_training_moves_the_student_alone():
    assert Trial(objective()).moved([0, 1, 2, 3, 4], [5, 6, 7, 8]) == BODY


def test_a_step_never_waits_for_the_device():
    trial = Trial(objective())
    with NoHostReads():
        trial.objective(trial.lesson([0, 1, 2, 3])).backward()
