import itertools
import math

import pytest
import torch
from torch import nn

from base.errors import SpecInvalid
from kdcore.objectives.ofd import Overhaul, margin, partial_l2_loss
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters


def objective(*taps: str, margins: tuple[str, ...] = ("norm",)) -> Overhaul:
    return Overhaul(features.Ofd(taps=taps or ("late",), margins=margins), SETTING)


def naive(student: torch.Tensor, teacher: torch.Tensor, margins: torch.Tensor) -> float:
    total = 0.0
    for i, j, y, x in itertools.product(*map(range, student.shape)):
        s, target = student[i, j, y, x].item(), max(teacher[i, j, y, x].item(), margins[j].item())
        if not s <= target <= 0:
            total += (s - target) ** 2
    return total / len(student)


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


def test_margin_of_a_standard_normal_equals_a_value_computed_by_hand():
    """The mean of the lower half is -√(2/π)."""
    assert margin(torch.ones(1), torch.zeros(1)).item() == pytest.approx(-math.sqrt(2 / math.pi))


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.5), (0.3, -0.4), (-2.0, 1.0), (0.5, 1.5), (1.0, -6.0)], ids=str)
def test_margin_is_the_mean_of_the_part_below_zero(weight, bias):
    value = margin(torch.tensor([weight], dtype=torch.float64), torch.tensor([bias], dtype=torch.float64))
    assert value.item() == pytest.approx(mean_below_zero(weight, bias), rel=1e-5)


@pytest.mark.parametrize(
    ("weight", "bias", "expected"),
    [(2.0, 10.0, -6.0), (-2.0, 1e30, -6.0), (0.0, -5.0, -5.0), (0.0, 5.0, 0.0), (0.0, 0.0, 0.0)],
    ids=["hardly ever below", "never below", "constant below", "constant above", "constant zero"],
)
def test_margin_without_a_part_below_zero(weight, bias, expected):
    assert margin(torch.tensor([weight]), torch.tensor([bias])).item() == pytest.approx(expected, abs=1e-30)


def test_partial_l2_loss_equals_a_value_computed_by_hand():
    """Margin -½. Teacher 2, student 1: 1². Teacher -9 means -½: student ½ is 1² off, student -2 is low enough.
    Teacher -0.2, student 0.1: 0.3²."""
    student = torch.tensor([1.0, 0.5, -2.0, 0.1]).reshape(1, 1, 2, 2)
    teacher = torch.tensor([2.0, -9.0, -9.0, -0.2]).reshape(1, 1, 2, 2)
    assert partial_l2_loss(student, teacher, torch.tensor([-0.5])).item() == pytest.approx(1 + 1 + 0 + 0.3**2)


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_partial_l2_loss_equals_the_cases_neuron_by_neuron(shape):
    student, teacher, margins = normal(*shape), normal(*shape, seed=1), -normal(shape[1], seed=2).abs()
    expected = naive(student, teacher, margins)
    assert partial_l2_loss(student, teacher, margins).item() == pytest.approx(expected, abs=1e-9)


def test_overhaul_halves_the_weight_from_each_tap_to_the_shallower_one():
    names = ("a", "b", "c")
    taps = [{name: normal(2, 4, 3, 3, seed=seed) for name in names} for seed in range(2)]
    seen = lesson(*taps, layers={"norm": nn.BatchNorm2d(4)})
    three, one = built(objective(*names, margins=("norm",) * 3), seen), built(objective("a"), seen)
    for layer in three.layers:
        layer.load_state_dict(one.layers[0].state_dict())
    assert three(seen).item() == pytest.approx(one(seen).item() * 1.75)


def test_overhaul_takes_its_margins_from_the_teachers_batch_norm_and_saves_them():
    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    seen = lesson({"late": normal(2, 4, 3, 3)}, {"late": normal(2, 6, 3, 3)}, layers={"norm": norm})
    overhaul = built(objective(), seen)
    assert parameters(overhaul) == 4 * 6 + 2 * 6
    expected = margin(norm.weight.detach(), norm.bias.detach()).double()
    assert torch.equal(overhaul.layers[0].margin_C, expected)
    nn.init.constant_(norm.bias, 3.0)
    again = built(objective(), seen)
    again.load_state_dict(overhaul.state_dict())
    assert torch.equal(again.layers[0].margin_C, expected)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.ReLU(), "margin 'norm' is a ReLU, where a batch norm with weight and bias is needed"),
        (nn.BatchNorm2d(6, affine=False), "margin 'norm' is a BatchNorm2d, where a batch norm with weight and bias"),
        (nn.BatchNorm2d(7), "margin 'norm' has 7 channels, the teacher's tap 'late' has 6"),
    ],
    ids=["no batch norm", "no weight", "other channels"],
)
def test_overhaul_refuses_a_layer_without_margins_by_name(layer, message):
    seen = lesson({"late": normal(2, 4, 3, 3)}, {"late": normal(2, 6, 3, 3)}, layers={"norm": layer})
    with pytest.raises(SpecInvalid, match=message):
        objective().build(seen)


def test_overhaul_needs_a_margin_for_each_tap():
    with pytest.raises(SpecInvalid, match="1 margins for 2 taps: each tap needs one"):
        objective("early", "late")
