import math

import pytest
import torch

from kdcore.objectives.sp import SimilarityPreserving, sp_loss
from kdcore.spec.methods.relations import Sp
from tests.kdcore.objectives.lessons import maps
from tests.kdcore.objectives.two_networks import BODY, MAP, SETTING, NoHostReads, Trial


def test_value_worked_out_by_hand():
    """The student sees two orthogonal images (G = I), the teacher two equal ones (every entry 1/√2)."""
    student, teacher = torch.eye(2).reshape(2, 2, 1, 1), torch.ones(2, 2, 1, 1)
    root = math.sqrt(1 / 2)
    assert sp_loss(student, teacher).item() == pytest.approx((2 * (1 - root) ** 2 + 2 * root**2) / 4)


def naive(student: torch.Tensor, teacher: torch.Tensor) -> float:
    def similarities(maps: torch.Tensor) -> list[float]:
        rows = maps.flatten(1).tolist()
        products = [[sum(p * q for p, q in zip(a, b, strict=True)) for b in rows] for a in rows]
        return [product / math.hypot(*row) for row in products for product in row]

    pairs = list(zip(similarities(student), similarities(teacher), strict=True))
    return sum((s - t) ** 2 for s, t in pairs) / len(pairs)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((5, 3, 4, 4), (5, 6, 4, 4)), ((4, 1, 3, 5), (4, 2, 7, 2)), ((3, 6), (3, 2)), ((2, 5, 4), (2, 3, 4))],
    ids=["widths differ", "odd and one channel", "embeddings", "tokens"],
)
def test_the_loss_agrees_with_plain_loops(student, teacher):
    student, teacher = maps(*student), maps(*teacher, seed=1)
    by_loops = naive(student, teacher)
    assert sp_loss(student, teacher).item() == pytest.approx(by_loops, rel=1e-9)
    assert sp_loss(student.float(), teacher.float()).item() == pytest.approx(by_loops, rel=1e-5)


def test_a_student_that_scales_its_teacher_loses_nothing():
    teacher = maps(8, 4, 3, 3)
    assert sp_loss(7 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_gradients_are_right_and_spare_the_teacher():
    student, teacher = maps(4, 2, 3, 3).requires_grad_(), maps(4, 3, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sp_loss(x, teacher.detach()), student)
    sp_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_a_batch_of_one_compares_nothing():
    student = maps(1, 4, 3, 3).requires_grad_()
    value = sp_loss(student, maps(1, 2, 5, 5, seed=1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12) and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_maps_of_zeros_keep_value_and_gradient_finite(side):
    """A dead image's row of G is 0, the teacher's of length 1."""
    student, teacher = maps(3, 2, 2, 2), maps(3, 2, 2, 2, seed=1)
    if side != "teacher":
        student[1] = 0
    if side != "student":
        teacher[1] = 0
    student.requires_grad_()
    value = sp_loss(student, teacher)
    value.backward()
    assert 0 <= value.item() < 1
    assert student.grad.isfinite().all() and student.grad.norm() < 10


def test_wholly_dead_layers_are_alike():
    dead = torch.zeros(3, 2, 2, 2, requires_grad=True)
    value = sp_loss(dead, torch.zeros(3, 1, 4, 4))
    value.backward()
    assert value.item() == 0 and dead.grad.count_nonzero() == 0


def objective() -> SimilarityPreserving:
    return SimilarityPreserving(Sp(tap=MAP), SETTING)


def test_the_objective_compares_its_tap_and_owns_nothing():
    trial = Trial(objective())
    lesson = trial.lesson([0, 4, 8])
    assert (trial.objective.needs.student_taps, trial.objective.needs.teacher_taps) == (("body",), ("trunk",))
    by_hand = sp_loss(lesson.student.taps["body"], lesson.teacher.taps["trunk"])
    assert trial.objective(lesson).item() == by_hand.item() > 0
    assert not trial.objective.state_dict()


def test_training_moves_the_student_alone():
    assert Trial(objective()).moved([0, 1, 2, 3, 4], [5, 6, 7, 8]) == BODY


def test_a_step_never_waits_for_the_device():
    trial = Trial(objective())
    with NoHostReads():
        trial.objective(trial.lesson([0, 1, 2])).backward()
