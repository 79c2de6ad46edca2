import copy
import math

import pytest
import torch
from torch import nn

from kdcore.lesson import Batch, Lesson, View
from kdcore.objectives.nkd import NormalizedKd, nkd_loss
from kdcore.objectives.objective import Setting
from kdcore.spec.methods.response import Nkd


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(n: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(2))


def objective(gamma: float = 1.5, temperature: float = 1.0) -> NormalizedKd:
    nobody = torch.empty(0, dtype=torch.int64)
    return NormalizedKd(Nkd(gamma=gamma), Setting(temperature, 5, 240, nobody, nobody))


def lesson(student: torch.Tensor, teacher: torch.Tensor) -> Lesson:
    right = labels(*student.shape)
    return Lesson(View(student), View(teacher), Batch(torch.empty(0), right, right))


def naive(student, teacher, right, gamma, temperature) -> float:
    def softmax(z: list[float]) -> list[float]:
        powers = [math.exp(value) for value in z]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), right.tolist(), strict=True):
        total -= softmax(t)[y] * math.log(softmax(s)[y])
        rest_s, rest_t = (softmax([v / temperature for k, v in enumerate(z) if k != y]) for z in (s, t))
        total -= gamma * temperature**2 * sum(a * math.log(b) for a, b in zip(rest_t, rest_s, strict=True))
    return total / len(student)


def test_worked_out_by_hand():
    """At label 0 the teacher's p is (1/2, 3/8, 1/8), the student's (1/3, 1/3, 1/3).

    Among the others, at λ = 2, the teacher's logits are ln 3 / 2 apart: q is (√3, 1) / (1 + √3) against (1/2, 1/2).
    """
    student, teacher = torch.zeros(1, 3), torch.tensor([[4.0, 3.0, 1.0]]).log()
    by_hand = 0.5 * math.log(3) + 1.5 * 4 * math.log(2)
    assert nkd_loss(student, teacher, torch.tensor([0]), gamma=1.5, temperature=2).item() == pytest.approx(by_hand)


@pytest.mark.parametrize(("n", "classes"), [(1, 2), (3, 2), (1, 5), (7, 3), (6, 11)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_agrees_with_the_formula_term_by_term(n, classes, temperature):
    student, teacher, right = logits(n, classes), logits(n, classes, seed=1), labels(n, classes)
    by_hand = naive(student, teacher, right, 1.5, temperature)
    options = {"gamma": 1.5, "temperature": temperature}
    assert nkd_loss(student, teacher, right, **options).item() == pytest.approx(by_hand, rel=1e-9)
    assert nkd_loss(student.float(), teacher.float(), right, **options).item() == pytest.approx(by_hand, rel=1e-5)


def test_the_targets_part_knows_no_temperature():
    student, teacher, right = logits(4, 5), logits(4, 5, seed=1), labels(4, 5)
    cold, hot = (nkd_loss(student, teacher, right, gamma=0, temperature=t) for t in (1, 8))
    assert cold.item() == hot.item()


def test_the_others_part_does_not_see_the_label():
    """Whatever either side makes of the label, the others' softmax is without it."""
    student, teacher, right = logits(4, 5), logits(4, 5, seed=1), labels(4, 5)

    def others(student: torch.Tensor, teacher: torch.Tensor) -> float:
        with_others, without = (nkd_loss(student, teacher, right, gamma=g, temperature=2) for g in (1, 0))
        return (with_others - without).item()

    plain, louder = others(student, teacher), torch.zeros(4, 5).scatter_(1, right[:, None], 6.0)
    assert others(student + louder, teacher - louder) == pytest.approx(plain, rel=1e-9)


def test_a_student_that_is_its_teacher_has_only_the_label_left_to_learn():
    """The others' part is at its least; the target's pulls at s_y by -t_y (1 - s_y)."""
    same, right = logits(5, 4).requires_grad_(), labels(5, 4)
    nkd_loss(same, same.detach(), right, gamma=1.5, temperature=1).backward()
    p = torch.softmax(same.detach(), 1)
    trust = p.gather(1, right[:, None])
    by_hand = trust * (p - nn.functional.one_hot(right, 4)) / 5
    assert torch.allclose(same.grad, by_hand, atol=1e-12)


def test_between_two_classes_there_is_nothing_to_say_about_the_others():
    student, teacher, right = logits(4, 2), logits(4, 2, seed=1), labels(4, 2)
    assert nkd_loss(student, teacher, right, gamma=9).item() == nkd_loss(student, teacher, right, gamma=0).item()


@pytest.mark.parametrize("classes", [2, 4])
def test_the_gradient_is_that_of_the_value(classes):
    student, teacher, right = logits(3, classes).requires_grad_(), logits(3, classes, seed=1), labels(3, classes)
    assert torch.autograd.gradcheck(lambda s: nkd_loss(s, teacher, right, temperature=2), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["zero", "ordinary", "huge"])
@pytest.mark.parametrize("shape", [(1, 2), (1, 5), (6, 5)], ids=["one of two", "batch of one", "batch"])
def test_value_and_gradient_are_finite_and_reach_the_student_alone(shape, scale, dtype):
    student = (scale * logits(*shape, dtype=dtype)).requires_grad_()
    teacher = (scale * logits(*shape, seed=1, dtype=dtype) + 1).requires_grad_()
    value = nkd_loss(student, teacher, labels(*shape))
    value.backward()
    assert value.shape == () and value.dtype == dtype and value.isfinite() and value >= 0
    assert student.grad.isfinite().all() and teacher.grad is None


def test_the_objective_is_the_loss_of_its_options():
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    by_hand = nkd_loss(student, teacher, labels(6, 5), gamma=3.5, temperature=3)
    assert objective(3.5, 3.0)(lesson(student, teacher)).item() == by_hand.item()


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
