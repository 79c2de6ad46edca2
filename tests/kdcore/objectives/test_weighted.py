import pytest
import torch
from torch import Tensor, nn

from kdcore.lesson import Batch, Lesson, Needs, View
from kdcore.objectives.objective import Objective
from kdcore.objectives.weighted import WeightedSum


class Squared(Objective):
    """Mean square of the student's logits times a parameter, with the given needs."""

    def __init__(self, taps: tuple[str, ...] = (), layers: tuple[str, ...] = (), gradient: bool = False) -> None:
        super().__init__()
        self.needs = Needs(taps, taps, layers, gradient)

    def build(self, lesson: Lesson) -> None:
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, lesson: Lesson) -> Tensor:
        loss = self.scale * lesson.student.logits.square().mean()
        self.observed["squared"] = loss.detach()
        return loss


class Distance(Objective):
    def forward(self, lesson: Lesson) -> Tensor:
        return (lesson.student.logits - lesson.teacher.logits).abs().mean()


def lesson() -> Lesson:
    """Mean square 5, mean distance 2."""
    student = torch.tensor([[1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 6.0]], dtype=torch.float64)
    return Lesson(View(student), View(teacher), Batch(torch.empty(0), torch.zeros(1).long(), torch.zeros(1).long()))


def made(*terms: tuple[str, float, Objective]) -> WeightedSum:
    objective = WeightedSum(terms)
    objective.build(lesson())
    return objective


def test_weighted_sum_equals_a_value_computed_by_hand():
    objective = made(("squared", 0.5, Squared()), ("distance", 10, Distance()))
    assert objective(lesson()).item() == pytest.approx(0.5 * 5 + 10 * 2)


def test_weighted_sum_has_the_weighted_sum_of_the_gradients():
    """Of the mean square: (1, 3); of the mean distance: (-1/2, -1/2)."""
    seen = lesson()
    made(("squared", 0.5, Squared()), ("distance", 10, Distance()))(seen).backward()
    assert seen.student.logits.grad[0].tolist() == pytest.approx([0.5 * 1 - 5, 0.5 * 3 - 5])


def test_weighted_sum_observes_each_value_without_its_weight_and_what_its_members_observe():
    objective = made(("first", 0.5, Squared()), ("second", 10, Distance()))
    objective(lesson())
    assert {name: value.item() for name, value in objective.observed.items()} == {
        "first": 5, "second": 2, "squared": 5,
    }  # fmt: skip
    assert not any(value.requires_grad for value in objective.observed.values())


def test_weighted_sum_needs_what_its_members_need_once():
    first, second = Squared(("a", "b"), ("norm",)), Squared(("b", "c"), gradient=True)
    needs = WeightedSum([("first", 1, first), ("second", 1, second)]).needs
    assert needs.student_taps == needs.teacher_taps == ("a", "b", "c")
    assert needs.teacher_layers == ("norm",) and needs.input_gradient


def test_weighted_sum_needs_no_input_gradient_if_no_member_does():
    assert not WeightedSum([("distance", 2, Distance())]).needs.input_gradient


def test_weighted_sum_trains_and_saves_what_its_members_own():
    objective = made(("squared", 0.5, Squared()), ("distance", 10, Distance()))
    assert [tuple(p.shape) for p in objective.parameters()] == [()]
    objective(lesson()).backward()
    (scale,) = objective.parameters()
    assert scale.grad.item() == pytest.approx(0.5 * 5)
    with torch.no_grad():
        scale.mul_(3)
    other = made(("squared", 0.5, Squared()), ("distance", 10, Distance()))
    other.load_state_dict(objective.state_dict())
    assert other(lesson()).item() == objective(lesson()).item() == pytest.approx(0.5 * 15 + 20)


def test_weighted_sum_passes_its_mode_to_its_members():
    objective = made(("squared", 1, Squared()), ("distance", 1, Distance()))
    objective.eval()
    assert not any(member.training for member in objective.objectives)
    objective.train()
    assert all(member.training for member in objective.objectives)
