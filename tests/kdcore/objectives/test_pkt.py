import math

import pytest
import torch

from kdcore.objectives.pkt import ProbabilisticTransfer, pkt_loss
from kdcore.spec.methods.relations import Pkt
from tests.kdcore.objectives.lessons import maps
from tests.kdcore.objectives.two_networks import BODY, EMBEDDING, SETTING, NoHostReads, Trial


def test_value_worked_out_by_hand():
    """Two equal vectors are as near as a vector to itself, p = (1/2, 1/2); two at a right angle half as near,
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
def test_the_loss_agrees_with_plain_loops(n, width, other):
    student, teacher = maps(n, width), maps(n, other, seed=1)
    by_loops = naive(student, teacher)
    assert pkt_loss(student, teacher).item() == pytest.approx(by_loops, rel=1e-9)
    assert pkt_loss(student.float(), teacher.float()).item() == pytest.approx(by_loops, rel=1e-5)


def test_a_student_that_scales_its_teacher_loses_nothing():
    """But for ε: lengths do not quite cancel."""
    teacher = maps(6, 4)
    assert pkt_loss(7 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_gradients_are_right_and_spare_the_teacher():
    student, teacher = maps(5, 3).requires_grad_(), maps(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pkt_loss(x, teacher.detach()), student)
    pkt_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_a_batch_of_one_compares_nothing():
    student = maps(1, 4).requires_grad_()
    value = pkt_loss(student, maps(1, 6, seed=1))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(4, 3), maps(4, 3)),
        (maps(4, 3), torch.zeros(4, 3)),
        (torch.zeros(4, 3), torch.zeros(4, 3)),
        (torch.cat([maps(3, 300), -maps(3, 300)]), maps(6, 5)),
        (maps(6, 5), torch.cat([maps(3, 300), -maps(3, 300)])),
    ],
    ids=["dead student", "dead teacher", "both dead", "student's opposites", "teacher's opposites"],
)
def test_value_and_gradient_stay_finite(student, teacher, dtype):
    student = student.to(dtype, copy=True).requires_grad_()
    value = pkt_loss(student, teacher.to(dtype))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


def objective() -> ProbabilisticTransfer:
    return ProbabilisticTransfer(Pkt(tap=EMBEDDING), SETTING)


def test_the_objective_compares_embeddings_and_owns_nothing():
    trial = Trial(objective())
    lesson = trial.lesson([0, 4, 8])
    assert (trial.objective.needs.student_taps, trial.objective.needs.teacher_taps) == (("fc@in",), ("head@in",))
    by_hand = pkt_loss(lesson.student.taps["fc@in"], lesson.teacher.taps["head@in"])
    assert trial.objective(lesson).item() == by_hand.item() > 0
    assert not trial.objective.state_dict()


def test_training_moves_the_student_alone():
    assert Trial(objective()).moved([0, 1, 2, 3, 4], [5, 6, 7, 8]) == BODY


def test_a_step_never_waits_for_the_device():
    trial = Trial(objective())
    with NoHostReads():
        trial.objective(trial.lesson([0, 1, 2])).backward()
