import math

import pytest
import torch
from torch.autograd import gradcheck

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives import build
from kdcore.objectives.objective import Setting
from kdcore.objectives.ttm import ttm_loss
from kdcore.spec.methods.response import Ttm

NOBODY = torch.empty(0, dtype=torch.int64)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


def by_loops(student: torch.Tensor, teacher: torch.Tensor, gamma: float, weighted: bool) -> float:
    total = 0.0
    for own, taught in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(z) / sum(map(math.exp, taught)) for z in taught]
        s = [math.exp(z) / sum(map(math.exp, own)) for z in own]
        power_sum = sum(one**gamma for one in p)
        kl = sum(one**gamma / power_sum * math.log(one**gamma / power_sum / q) for one, q in zip(p, s, strict=True))
        total += power_sum * kl if weighted else kl
    return total / len(student)


@pytest.mark.parametrize("weighted", [True, False])
def test_worked_out_by_hand(weighted: bool):
    """p_t = (0.9, 0.1) at T = 2: roots 3 and 1 over √10, so the target is (3/4, 1/4) and U = 4/√10. Student 1/2."""
    teacher = torch.tensor([[math.log(9.0), 0.0]], dtype=torch.float64)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    expected = kl * 4 / math.sqrt(10) if weighted else kl
    assert ttm_loss(torch.zeros_like(teacher), teacher, temperature=2.0, weighted=weighted).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("shape", "temperature"), [((1, 2), 10.0), ((4, 7), 5.0), ((3, 100), 1.0)])
def test_it_is_the_formula_written_out(shape: tuple[int, int], temperature: float, weighted: bool):
    student, teacher = logits(*shape), logits(*shape, seed=1)
    expected = by_loops(student, teacher, 1 / temperature, weighted)
    assert ttm_loss(student, teacher, temperature=temperature, weighted=weighted).item() == pytest.approx(
        expected, rel=1e-9
    )
    single = ttm_loss(student.float(), teacher.float(), temperature=temperature, weighted=weighted)
    assert single.item() == pytest.approx(expected, rel=1e-4)


def test_at_temperature_1_it_is_the_divergence_and_identical_networks_are_at_0():
    student, teacher = logits(5, 4), logits(5, 4, seed=1)
    kl = torch.nn.functional.kl_div(
        student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert ttm_loss(student, teacher, temperature=1.0).item() == pytest.approx(kl.item())
    assert ttm_loss(teacher, teacher, temperature=1.0).item() == pytest.approx(0, abs=1e-12)


def test_the_power_sum_is_1_for_a_sure_teacher_and_largest_for_one_that_guesses():
    sure, guess = torch.tensor([[400.0, 0, 0, 0]]), torch.zeros(1, 4)
    student = logits(1, 4, dtype=torch.float32)
    plain, weighted = (ttm_loss(student, sure, temperature=5.0, weighted=w).item() for w in (False, True))
    assert weighted == pytest.approx(plain)
    plain, weighted = (ttm_loss(student, guess, temperature=5.0, weighted=w).item() for w in (False, True))
    assert weighted == pytest.approx(plain * 4**0.8)


def test_the_gradient_is_right_and_reaches_the_student_alone():
    student, teacher = logits(3, 5).requires_grad_(), logits(3, 5, seed=1).requires_grad_()
    assert gradcheck(lambda z: ttm_loss(z, teacher, temperature=5.0), (student,))
    ttm_loss(student, teacher, temperature=5.0).backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_extreme_logits_stay_numbers():
    student = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_()
    loss = ttm_loss(student, torch.tensor([[-1e4, 1e4, 0.0]]), temperature=10.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_the_objective_takes_the_jobs_temperature_and_its_own_weighting():
    setting = Setting(temperature=3.0, num_classes=4, epochs=1, labels=NOBODY, rows=NOBODY)
    student, teacher = logits(2, 4), logits(2, 4, seed=1)
    batch = Batch(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.tensor([0, 1]), torch.arange(2))
    objective = build([Ttm(weighted=False)], setting)[-1]
    assert objective is not None
    loss = objective(Lesson(View(student), View(teacher), batch))
    assert loss.item() == ttm_loss(student, teacher, temperature=3.0, weighted=False).item()
