import math

import pytest
import torch

from kdcore.objectives.kd import (
    KnowledgeDistillation,
    kd_cross_entropy_loss,
    kd_kl_loss,
    kd_logits_l2_loss,
    kd_probabilities_l2_loss,
)
from kdcore.spec.methods.response import Kd
from tests.kdcore.objectives.lessons import lesson, normal, setting


def objective(form: str, temperature: float | None) -> KnowledgeDistillation:
    return KnowledgeDistillation(Kd(form=form), setting(temperature))


# Two classes at T = 2: the teacher's logits 2·ln 3 apart give p = (3/4, 1/4), the student's equal ones (1/2, 1/2).
STUDENT, TEACHER = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])


def test_kd_kl_loss_equals_a_value_computed_by_hand():
    by_hand = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert kd_kl_loss(STUDENT, TEACHER, temperature=2).item() == pytest.approx(by_hand)


def test_kd_cross_entropy_loss_equals_a_value_computed_by_hand():
    assert kd_cross_entropy_loss(STUDENT, TEACHER, temperature=2).item() == pytest.approx(4 * math.log(2))


def test_kd_probabilities_l2_loss_equals_a_value_computed_by_hand():
    assert kd_probabilities_l2_loss(STUDENT, TEACHER, temperature=2).item() == pytest.approx(4 * 2 * 0.25**2)


def test_kd_logits_l2_loss_equals_a_value_computed_by_hand():
    assert kd_logits_l2_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -2.0]])).item() == (9 + 16) / 2


def test_kd_kl_loss_and_kd_cross_entropy_loss_differ_by_the_teachers_entropy_and_share_the_gradient():
    student, teacher = normal(6, 7).requires_grad_(), normal(6, 7, seed=1)
    p = torch.softmax(teacher / 4, 1)
    entropy = -(p * p.log()).sum(1).mean().item()
    kl, cross = kd_kl_loss(student, teacher, temperature=4), kd_cross_entropy_loss(student, teacher, temperature=4)
    assert (cross - kl).item() == pytest.approx(16 * entropy)
    (of_kl,), (of_cross,) = torch.autograd.grad(kl, student), torch.autograd.grad(cross, student)
    assert torch.allclose(of_kl, of_cross)


def test_kd_kl_loss_of_centred_logits_at_a_high_temperature_is_half_of_kd_logits_l2_loss():
    student, teacher = (z - z.mean(1, keepdim=True) for z in (normal(8, 10), normal(8, 10, seed=1)))
    hot = kd_kl_loss(student, teacher, temperature=1e4)
    assert hot.item() == pytest.approx(kd_logits_l2_loss(student, teacher).item() / 2, rel=1e-3)


def test_kd_kl_loss_keeps_the_size_of_its_gradient_when_the_temperature_changes():
    student, teacher = normal(4, 10).requires_grad_(), normal(4, 10, seed=1)
    norms = [torch.autograd.grad(kd_kl_loss(student, teacher, temperature=t), student)[0].norm() for t in (20.0, 40.0)]
    assert (norms[1] / norms[0]).item() == pytest.approx(1, abs=0.05)


def test_knowledge_distillation_is_the_loss_of_its_form():
    student, teacher = normal(4, 6), normal(4, 6, seed=1)
    by_form = {
        "kl": kd_kl_loss(student, teacher, temperature=4),
        "cross_entropy": kd_cross_entropy_loss(student, teacher, temperature=4),
        "probabilities_l2": kd_probabilities_l2_loss(student, teacher, temperature=4),
        "logits_l2": kd_logits_l2_loss(student, teacher),
    }
    for form, value in by_form.items():
        assert objective(form, 4.0)(lesson(student, teacher)).item() == value.item()


def test_knowledge_distillation_of_logits_l2_needs_no_temperature():
    assert objective("logits_l2", None)(lesson(STUDENT, TEACHER)).isfinite()
