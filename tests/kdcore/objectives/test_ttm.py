import math

import pytest
import torch

from kdcore.objectives.ttm import TransformedTeacher, ttm_loss
from kdcore.spec.methods.response import Ttm
from tests.kdcore.objectives.lessons import lesson, normal, setting

both_forms = pytest.mark.parametrize("weighted", [True, False])


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * normal(*shape, seed=seed)


def naive(student: torch.Tensor, teacher: torch.Tensor, gamma: float, weighted: bool) -> float:
    total = 0.0
    for of_student, of_teacher in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(z) / sum(map(math.exp, of_teacher)) for z in of_teacher]
        s = [math.exp(z) / sum(map(math.exp, of_student)) for z in of_student]
        power_sum = sum(one**gamma for one in p)
        kl = sum(one**gamma / power_sum * math.log(one**gamma / power_sum / q) for one, q in zip(p, s, strict=True))
        total += power_sum * kl if weighted else kl
    return total / len(student)


@both_forms
def test_ttm_loss_equals_a_value_computed_by_hand(weighted):
    """p_t = (0.9, 0.1) at T = 2: roots 3 and 1 over √10, so the target is (3/4, 1/4) and U = 4/√10. Student 1/2."""
    teacher = torch.tensor([[math.log(9.0), 0.0]], dtype=torch.float64)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    value = ttm_loss(torch.zeros_like(teacher), teacher, temperature=2.0, weighted=weighted)
    assert value.item() == pytest.approx(kl * 4 / math.sqrt(10) if weighted else kl)


@both_forms
@pytest.mark.parametrize(("shape", "temperature"), [((1, 2), 10.0), ((4, 7), 5.0), ((3, 100), 1.0)])
def test_ttm_loss_equals_the_formula_term_by_term(shape, temperature, weighted):
    """Without T²."""
    student, teacher = logits(*shape), logits(*shape, seed=1)
    value = ttm_loss(student, teacher, temperature=temperature, weighted=weighted)
    assert value.item() == pytest.approx(naive(student, teacher, 1 / temperature, weighted), rel=1e-9)


def test_ttm_loss_at_temperature_one_is_the_divergence_and_zero_for_equal_sides():
    student, teacher = logits(5, 4), logits(5, 4, seed=1)
    kl = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert ttm_loss(student, teacher, temperature=1.0).item() == pytest.approx(kl.item())
    assert ttm_loss(teacher, teacher, temperature=1.0).item() == pytest.approx(0, abs=1e-12)


def test_ttm_loss_weighs_a_certain_teacher_by_one_and_a_uniform_one_most():
    student, certain, uniform = logits(1, 4).float(), torch.tensor([[400.0, 0, 0, 0]]), torch.zeros(1, 4)
    for teacher, power_sum in ((certain, 1), (uniform, 4**0.8)):
        plain, weighted = (ttm_loss(student, teacher, temperature=5.0, weighted=w).item() for w in (False, True))
        assert weighted == pytest.approx(plain * power_sum)


def test_transformed_teacher_has_the_jobs_temperature_and_its_own_weighting():
    student, teacher = logits(2, 4), logits(2, 4, seed=1)
    objective = TransformedTeacher(Ttm(weighted=False), setting(temperature=3.0))
    by_hand = ttm_loss(student, teacher, temperature=3.0, weighted=False)
    assert objective(lesson(student, teacher)).item() == by_hand.item()
