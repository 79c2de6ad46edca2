import math

import pytest
import torch

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.kd import (
    KnowledgeDistillation,
    kd_cross_entropy_loss,
    kd_kl_loss,
    kd_logits_l2_loss,
    kd_probabilities_l2_loss,
)
from kdcore.objectives.objective import Setting
from kdcore.objectives.standardized import Standardized
from kdcore.spec.methods.response import Kd

SOFTENED = [kd_kl_loss, kd_cross_entropy_loss, kd_probabilities_l2_loss]


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def objective(form: str, temperature: float | None) -> KnowledgeDistillation:
    nobody = torch.empty(0, dtype=torch.int64)
    return KnowledgeDistillation(Kd(form=form), Setting(temperature, 3, 240, nobody, nobody))


def lesson(student: torch.Tensor, teacher: torch.Tensor) -> Lesson:
    return Lesson(View(student), View(teacher), Batch(torch.empty(0), torch.empty(0), torch.empty(0)))


# Two classes at T = 2: the teacher's logits 2·ln 3 apart give p = (3/4, 1/4), the student's equal ones (1/2, 1/2).
STUDENT, TEACHER = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])


def test_kl_worked_out_by_hand():
    by_hand = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert kd_kl_loss(STUDENT, TEACHER, temperature=2).item() == pytest.approx(by_hand)


def test_cross_entropy_worked_out_by_hand():
    assert kd_cross_entropy_loss(STUDENT, TEACHER, temperature=2).item() == pytest.approx(4 * math.log(2))


def test_probabilities_l2_worked_out_by_hand():
    assert kd_probabilities_l2_loss(STUDENT, TEACHER, temperature=2).item() == pytest.approx(4 * 2 * 0.25**2)


def test_logits_l2_worked_out_by_hand():
    assert kd_logits_l2_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]])).item() == (9 + 16) / 2


@pytest.mark.parametrize("loss", SOFTENED)
def test_the_mean_runs_over_the_batch_and_the_sum_over_classes(loss):
    """Twice the same sample is worth as much as once; a mean over classes would be K times smaller."""
    student, teacher = logits(1, 5), logits(1, 5, seed=1)
    once = loss(student, teacher, temperature=3)
    assert loss(student.repeat(2, 1), teacher.repeat(2, 1), temperature=3).item() == pytest.approx(once.item())


def test_kl_and_cross_entropy_differ_by_the_teachers_entropy_and_share_the_gradient():
    student, teacher = logits(6, 7).requires_grad_(), logits(6, 7, seed=1)
    p = torch.softmax(teacher / 4, 1)
    entropy = -(p * p.log()).sum(1).mean().item()
    kl, cross = kd_kl_loss(student, teacher, temperature=4), kd_cross_entropy_loss(student, teacher, temperature=4)
    assert (cross - kl).item() == pytest.approx(16 * entropy)
    (of_kl,), (of_cross,) = torch.autograd.grad(kl, student), torch.autograd.grad(cross, student)
    assert torch.allclose(of_kl, of_cross)


def test_hot_kl_of_centred_logits_is_half_the_l2_of_logits():
    student, teacher = (z - z.mean(1, keepdim=True) for z in (logits(8, 10), logits(8, 10, seed=1)))
    hot = kd_kl_loss(student, teacher, temperature=1e4)
    assert hot.item() == pytest.approx(kd_logits_l2_loss(student, teacher).item() / 2, rel=1e-3)


def test_t_squared_keeps_the_gradient_at_its_size():
    student, teacher = logits(4, 10).requires_grad_(), logits(4, 10, seed=1)
    norms = [torch.autograd.grad(kd_kl_loss(student, teacher, temperature=t), student)[0].norm() for t in (20.0, 40.0)]
    assert (norms[1] / norms[0]).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("loss", [kd_kl_loss, kd_probabilities_l2_loss])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss):
    same = logits(5, 4).requires_grad_()
    value = loss(same, same.detach(), temperature=4)
    assert value.item() == pytest.approx(0, abs=1e-12)
    value.backward()
    assert same.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", ["kl", "cross_entropy", "logits_l2", "probabilities_l2"])
@pytest.mark.parametrize("standardized", [False, True], ids=["plain", "standardized"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (logits(1, 3), logits(1, 3, seed=1)),
        (logits(4, 2, dtype=torch.float32) * 1e4, logits(4, 2, seed=1, dtype=torch.float32) * 1e4),
        (torch.zeros(3, 5), torch.zeros(3, 5)),
    ],
    ids=["batch of one", "huge logits", "all zero"],
)
def test_value_and_gradient_are_finite_and_reach_the_student_alone(form, standardized, student, teacher):
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    compare = objective(form, 4.0)
    value = (Standardized(compare) if standardized else compare)(lesson(student, teacher))
    value.backward()
    assert value.shape == () and value.isfinite()
    assert student.grad.isfinite().all() and teacher.grad is None


@pytest.mark.parametrize("loss", [*SOFTENED, lambda s, t, temperature: kd_logits_l2_loss(s, t)])
def test_the_gradient_is_that_of_the_value(loss):
    student = logits(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, logits(3, 4, seed=1), temperature=4), student)


def test_the_form_is_the_one_asked_for():
    student, teacher = logits(4, 6), logits(4, 6, seed=1)
    by_form = {
        "kl": kd_kl_loss(student, teacher, temperature=4),
        "cross_entropy": kd_cross_entropy_loss(student, teacher, temperature=4),
        "probabilities_l2": kd_probabilities_l2_loss(student, teacher, temperature=4),
        "logits_l2": kd_logits_l2_loss(student, teacher),
    }
    for form, value in by_form.items():
        assert objective(form, 4.0)(lesson(student, teacher)).item() == value.item()


def test_logits_l2_needs_no_temperature():
    assert objective("logits_l2", None)(lesson(STUDENT, TEACHER)).isfinite()
