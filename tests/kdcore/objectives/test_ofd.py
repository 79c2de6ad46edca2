import itertools
import math

import pytest
import torch
from torch import nn

from base.errors import SpecInvalid
from kdcore.objectives.ofd import Overhaul, margin, partial_l2_loss
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, Classroom, lesson, maps, parameters


def objective(*taps: str, margins: tuple[str, ...] = ("norm",)) -> Overhaul:
    return Overhaul(features.Ofd(taps=taps or ("late",), margins=margins), SETTING)


def naive(student, teacher, margins) -> float:
    n, c, h, w = student.shape
    total = 0.0
    for i, j, y, x in itertools.product(range(n), range(c), range(h), range(w)):
        s, target = student[i, j, y, x].item(), max(teacher[i, j, y, x].item(), margins[j].item())
        if not s <= target <= 0:
            total += (s - target) ** 2
    return total / n


def mean_below_zero(weight: float, bias: float, steps: int = 20_000) -> float:
    """By adding up the density in small steps."""
    low = bias - 10 * abs(weight)
    width = (0 - low) / steps
    mass = moment = 0.0
    for i in range(steps):
        x = low + (i + 0.5) * width
        density = math.exp(-(((x - bias) / weight) ** 2) / 2)
        mass, moment = mass + density, moment + x * density
    return moment / mass


def test_margin_of_a_standard_normal_worked_out_by_hand():
    """The mean of the lower half is -√(2/π)."""
    assert margin(torch.ones(1), torch.zeros(1)).item() == pytest.approx(-math.sqrt(2 / math.pi))


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.5), (0.3, -0.4), (-2.0, 1.0), (0.5, 1.5), (1.0, -6.0)], ids=str)
def test_margin_is_the_mean_of_what_is_below_zero(weight, bias):
    value = margin(torch.tensor([weight], dtype=torch.float64), torch.tensor([bias], dtype=torch.float64))
    assert value.item() == pytest.approx(mean_below_zero(weight, bias), rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [(2.0, 10.0, -6.0), (-2.0, 1e30, -6.0), (0.0, -5.0, -5.0), (0.0, 5.0, 0.0), (0.0, 0.0, 0.0)],
    ids=["hardly ever below", "never below", "constant below", "constant above", "constant zero"],
)
def test_margin_where_there_is_nothing_to_average(weight, bias, expected):
    assert margin(torch.tensor([weight]), torch.tensor([bias])).item() == pytest.approx(expected, abs=1e-30)


def test_partial_l2_worked_out_by_hand():
    """Margin -½. Teacher 2, student 1: 1². Teacher -9 means -½: student ½ is 1² off, student -2 is low enough.
    Teacher -0.2, student 0.1: 0.3²."""
    student = torch.tensor([1.0, 0.5, -2.0, 0.1]).reshape(1, 1, 2, 2)
    teacher = torch.tensor([2.0, -9.0, -9.0, -0.2]).reshape(1, 1, 2, 2)
    by_hand = 1 + 1 + 0 + 0.3**2
    assert partial_l2_loss(student, teacher, torch.tensor([-0.5])).item() == pytest.approx(by_hand)
    twice = partial_l2_loss(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1), torch.tensor([-0.5]))
    assert twice.item() == pytest.approx(by_hand), "sum over neurons, mean over the batch"


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_it_is_the_cases_written_out(shape, dtype, close):
    student, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    margins = -maps(shape[1], seed=2, dtype=dtype).abs()
    assert partial_l2_loss(student, teacher, margins).item() == pytest.approx(
        naive(student, teacher, margins), abs=close
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    teacher = maps(2, 3, 4, 4)
    student = teacher.clone().requires_grad_()
    value = partial_l2_loss(student, teacher, torch.full((3,), -10.0, dtype=torch.float64))
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_gradients_are_right_and_none_reaches_the_teacher():
    student, teacher = maps(2, 3, 2, 3).requires_grad_(), maps(2, 3, 2, 3, seed=1).requires_grad_()
    margins = torch.full((3,), -0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: partial_l2_loss(s, teacher.detach(), margins), student)
    partial_l2_loss(student, teacher, margins).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (maps(1, 1, 1, 1), maps(1, 1, 1, 1, seed=1)),
        (maps(2, 3, 7, 5), maps(2, 4, 3, 5, seed=1)),
        (maps(2, 3, 3, 2), maps(2, 3, 6, 4, seed=1)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)),
    ],
    ids=["one of each", "odd and larger", "smaller", "all zero"],
)
def test_value_and_gradient_are_finite(student, teacher):
    student = student.clone().requires_grad_()
    norm = nn.BatchNorm2d(teacher.shape[1])
    overhaul, seen = objective(), lesson({"late": student}, {"late": teacher}, layers={"norm": norm})
    overhaul.build(seen)
    value = overhaul(seen)
    value.backward()
    assert value.shape == () and value.isfinite() and student.grad.isfinite().all()


def test_the_deepest_tap_weighs_one_and_each_before_it_half_of_the_next():
    names = ("a", "b", "c")
    teacher = {name: maps(2, 4, 3, 3, seed=1) for name in names}
    layers = {"norm": nn.BatchNorm2d(4)}
    seen = lesson({name: maps(2, 4, 3, 3) for name in names}, teacher, layers=layers)
    three, one = objective(*names, margins=("norm",) * 3), objective("a")
    three.build(seen)
    one.build(seen)
    for layer in three.layers:
        layer.load_state_dict(one.layers[0].state_dict())
    assert three(seen).item() == pytest.approx(one(seen).item() * 1.75)


def test_training_changes_the_student_and_the_connector_and_no_margin():
    room, overhaul = Classroom(), objective()
    assert overhaul.needs.student_taps == overhaul.needs.teacher_taps == (
        "late",
    ) and overhaul.needs.teacher_layers == ("norm",)
    nn.init.uniform_(room.teacher.norm.weight)
    nn.init.uniform_(room.teacher.norm.bias)
    room.build(overhaul)
    expected = margin(room.teacher.norm.weight.detach(), room.teacher.norm.bias.detach())
    assert parameters(overhaul) == 4 * 6 + 2 * 6
    owned = {f"objective.{name}" for name, _ in overhaul.named_parameters()}
    assert room.changed_by_training(overhaul) == room.students() | owned
    assert torch.equal(overhaul.layers[0].margin_C, expected)


def test_a_state_that_is_put_back_gives_the_same_loss_whatever_the_margins_were():
    room, overhaul, again = Classroom(), objective(), objective()
    room.build(overhaul)
    room.changed_by_training(overhaul)
    nn.init.constant_(room.teacher.norm.bias, 3.0)
    room.build(again)
    again.load_state_dict(overhaul.state_dict())
    seen = room.lesson()
    assert torch.equal(again.eval()(seen), overhaul.eval()(seen))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ReLU(), "margin 'norm' is a ReLU, where a batch norm with weight and bias is needed"),
        (nn.BatchNorm2d(6, affine=False), "margin 'norm' is a BatchNorm2d, where a batch norm with weight and bias"),
        (nn.BatchNorm2d(7), "margin 'norm' has 7 channels, the teacher's tap 'late' has 6"),
    ],
    ids=["no batch norm", "no weight", "other channels"],
)
def test_a_layer_that_gives_no_margin_is_refused_by_name(layer, message):
    seen = lesson({"late": maps(2, 4, 3, 3)}, {"late": maps(2, 6, 3, 3)}, layers={"norm": layer})
    with pytest.raises(SpecInvalid, match=message):
        objective().build(seen)


def test_each_tap_needs_a_margin():
    with pytest.raises(SpecInvalid, match="1 margins for 2 taps: each tap needs one"):
        Overhaul(features.Ofd(taps=("early", "late"), margins=("norm",)), SETTING)
