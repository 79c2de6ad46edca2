import copy
import math

import pytest
import torch
from torch import nn

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.dkd import DecoupledKd, dkd_loss
from kdcore.objectives.kd import kd_kl_loss
from kdcore.objectives.objective import Setting
from kdcore.spec.methods.response import Dkd


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(n: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(2))


def objective(**options: float) -> DecoupledKd:
    nobody = torch.empty(0, dtype=torch.int64)
    return DecoupledKd(Dkd(**({"warmup_epochs": 0} | options)), Setting(4.0, 5, 240, nobody, nobody))


def lesson(student: torch.Tensor, teacher: torch.Tensor, epoch: int = 1) -> Lesson:
    right = labels(*student.shape)
    return Lesson(View(student), View(teacher), Batch(torch.empty(0), right, right, epoch))


def naive(student, teacher, right, temperature, target_weight, non_target_weight) -> float:
    """The two divergences term by term, as sections 3.1 and 3.3 define them."""

    def parts(z: list[float], y: int) -> tuple[list[float], list[float]]:
        powers = [math.exp(value / temperature) for value in z]
        p, others = powers[y] / sum(powers), [power for k, power in enumerate(powers) if k != y]
        return [p, 1 - p], [power / sum(others) for power in others]

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), right.tolist(), strict=True):
        (coin_s, rest_s), (coin_t, rest_t) = parts(s, y), parts(t, y)
        total += target_weight * kl(coin_t, coin_s) + non_target_weight * kl(rest_t, rest_s)
    return temperature**2 * total / len(student)


def test_worked_out_by_hand():
    """At T = 1 and label 0 the teacher's p is (1/2, 3/8, 1/8), the student's (1/3, 1/3, 1/3).

    So b is (1/2, 1/2) against (1/3, 2/3), and q is (3/4, 1/4) against (1/2, 1/2).
    """
    student, teacher = torch.zeros(1, 3), torch.tensor([[4.0, 3.0, 1.0]]).log()
    target = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    others = 0.75 * math.log(3 / 2) + 0.25 * math.log(1 / 2)
    value = dkd_loss(student, teacher, torch.tensor([0]), temperature=1, target_weight=2, non_target_weight=5)
    assert value.item() == pytest.approx(2 * target + 5 * others)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (3, 2), (1, 5), (7, 3), (6, 11)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_agrees_with_the_two_divergences_term_by_term(n, classes, temperature):
    student, teacher, right = logits(n, classes), logits(n, classes, seed=1), labels(n, classes)
    options = {"temperature": temperature, "target_weight": 1.5, "non_target_weight": 8.0}
    by_hand = naive(student, teacher, right, temperature, 1.5, 8.0)
    assert dkd_loss(student, teacher, right, **options).item() == pytest.approx(by_hand, rel=1e-9)
    assert dkd_loss(student.float(), teacher.float(), right, **options).item() == pytest.approx(by_hand, rel=1e-5)


def test_of_one_sample_it_is_kd_where_the_others_weigh_what_the_teacher_gives_them():
    """Section 3.1: KD = KL(b_t ‖ b_s) + (1 - p_t,y) · KL(q_t ‖ q_s)."""
    student, teacher, right = logits(1, 6), logits(1, 6, seed=1), torch.tensor([4])
    others = 1 - torch.softmax(teacher / 4, 1)[0, 4].item()
    value = dkd_loss(student, teacher, right, temperature=4, target_weight=1, non_target_weight=others)
    assert value.item() == pytest.approx(kd_kl_loss(student, teacher, temperature=4).item(), rel=1e-12)


def test_between_two_classes_there_is_nothing_to_say_about_the_others():
    student, teacher, right = logits(4, 2).requires_grad_(), logits(4, 2, seed=1), labels(4, 2)
    value = dkd_loss(student, teacher, right, temperature=4, target_weight=0, non_target_weight=8)
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    same = logits(5, 4).requires_grad_()
    value = dkd_loss(same, same.detach(), labels(5, 4), temperature=4)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert same.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_is_that_of_the_value(classes):
    student, teacher, right = logits(3, classes).requires_grad_(), logits(3, classes, seed=1), labels(3, classes)
    assert torch.autograd.gradcheck(lambda s: dkd_loss(s, teacher, right, temperature=2), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["zero", "ordinary", "huge"])
@pytest.mark.parametrize("shape", [(1, 2), (1, 5), (6, 5)], ids=["one of two", "batch of one", "batch"])
def test_value_and_gradient_are_finite_and_reach_the_student_alone(shape, scale, dtype):
    student = (scale * logits(*shape, dtype=dtype)).requires_grad_()
    teacher = (scale * logits(*shape, seed=1, dtype=dtype) + 1).requires_grad_()
    value = dkd_loss(student, teacher, labels(*shape), temperature=1)
    value.backward()
    assert value.shape == () and value.dtype == dtype and value.isfinite()
    assert student.grad.isfinite().all() and teacher.grad is None


@pytest.mark.parametrize("sure_of", [0, 1], ids=["right", "wrong"])
def test_a_student_sure_beyond_float32_still_learns_exactly(sure_of):
    """p_y or 1 - p_y is e^-200: 0 in float32, and its logarithm -inf."""
    student = torch.zeros(1, 3)
    student[0, sure_of] = 200
    teacher, right = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([0])
    student.requires_grad_()
    value = dkd_loss(student, teacher, right, temperature=1)
    value.backward()
    exactly = dkd_loss(student.detach().double(), teacher.double(), right, temperature=1)
    assert value.item() == pytest.approx(exactly.item(), rel=1e-5)
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_the_objective_is_the_loss_of_its_options():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    by_hand = dkd_loss(student, teacher, labels(6, 5), temperature=4, target_weight=0.5, non_target_weight=6)
    compare = objective(target_weight=0.5, non_target_weight=6)
    assert compare(lesson(student, teacher)).item() == by_hand.item()


@pytest.mark.parametrize(
    ("warmup", "epoch", "factor"), [(20, 1, 0.05), (20, 10, 0.5), (20, 20, 1), (20, 200, 1), (0, 1, 1), (1, 1, 1)]
)
def test_the_loss_grows_over_the_first_epochs(warmup, epoch, factor):
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    whole = objective()(lesson(student, teacher))
    now = objective(warmup_epochs=warmup)(lesson(student, teacher, epoch))
    assert now.item() == pytest.approx(factor * whole.item())


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
