import itertools

import pytest
import torch

from kdcore.objectives.activation_boundary import ActivationBoundaries, boundary_distance, boundary_loss, from_options
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters


def objective(*taps: str) -> ActivationBoundaries:
    return ActivationBoundaries(features.ActivationBoundary(taps=taps), SETTING)


def naive(student: torch.Tensor, teacher: torch.Tensor, margin: float) -> float:
    """The paper's cases, neuron by neuron."""
    total = 0.0
    for place in itertools.product(*map(range, student.shape)):
        s, t = student[place].item(), teacher[place].item()
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
    return total / len(student)


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def test_boundary_loss_equals_a_value_computed_by_hand():
    """½ should be at -1 or below: 1.5². -½ should be at 1 or above: 1.5². 2 and -2 are beyond the margin."""
    assert boundary_loss(row(0.5, -0.5, 2, -2), row(-3, 3, 3, -3)).item() == pytest.approx(1.5**2 + 1.5**2)


@pytest.mark.parametrize("margin", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_boundary_loss_equals_the_cases_neuron_by_neuron(shape, margin):
    student, teacher = normal(*shape), normal(*shape, seed=1)
    expected = naive(student, teacher, margin)
    assert boundary_loss(student, teacher, margin=margin).item() == pytest.approx(expected, abs=1e-9)


def test_boundary_loss_counts_a_neuron_at_zero_as_inactive():
    assert boundary_loss(row(0.0), row(0.0), margin=2).item() == 4
    assert boundary_distance(row(0.0), row(-1.0)).item() == 0


def test_boundary_loss_of_a_student_beyond_the_margin_is_zero_without_gradient():
    teacher = normal(3, 4, 2, 2)
    student = (teacher.sign() * 1.5).requires_grad_()
    value = boundary_loss(student, teacher)
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_boundary_distance_is_the_share_of_neurons_that_differ():
    """Of four neurons, the first and the last are active in one map only."""
    assert boundary_distance(row(1, 1, -1, -1), row(-1, 2, -2, 1)).item() == 0.5
    assert not boundary_distance(row(1.0).requires_grad_(), row(2.0)).requires_grad


def test_activation_boundaries_halve_the_weight_from_each_tap_to_the_shallower_one():
    """Three taps with a loss of 4.5 each and no connectors: 3/1000 · 4.5 · (1/4 + 1/2 + 1)."""
    taps = {name: row(0.5, -0.5) for name in "abc"}
    seen = lesson(taps, {name: row(-3, 3) for name in taps})
    boundaries = built(objective(*taps), seen)
    assert boundaries(seen).item() == pytest.approx(3 / 1000 * 4.5 * 1.75)
    assert boundaries.observed["activation_boundary/differing"].item() == 1


def test_activation_boundaries_connect_only_maps_of_different_widths():
    student = {"early": normal(2, 3, 4, 4), "late": normal(2, 3, 4, 4)}
    boundaries = built(objective("early", "late"), lesson(student, student | {"late": normal(2, 5, 4, 4)}))
    assert list(map(parameters, boundaries.connectors)) == [0, 3 * 5 + 2 * 5]


def test_from_options_puts_activation_boundaries_first_and_leaves_no_objective():
    stages = from_options(features.ActivationBoundary(taps=("early",)), SETTING)
    assert isinstance(stages.first, ActivationBoundaries) and stages.then is None
