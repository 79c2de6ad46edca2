import itertools

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives.activation_boundary import ActivationBoundaries, boundary_distance, boundary_loss, from_options
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, Classroom, lesson, maps, parameters

TAPS = ("early", "late")


def objective(*taps, margin: float = 1.0) -> ActivationBoundaries:
    return ActivationBoundaries(features.ActivationBoundary(taps=taps or TAPS, margin=margin), SETTING)


def naive(student, teacher, margin) -> float:
    """As the paper's cases have it."""
    n, c, h, w = student.shape
    total = 0.0
    for place in itertools.product(range(n), range(c), range(h), range(w)):
        s, t = student[place].item(), teacher[place].item()
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
    return total / n


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def test_value_worked_out_by_hand():
    """½ should be at -1 or below: 1.5². -½ should be at 1 or above: 1.5². 2 and -2 are beyond the margin already."""
    assert boundary_loss(row(0.5, -0.5, 2, -2), row(-3, 3, 3, -3)).item() == pytest.approx(1.5**2 + 1.5**2)


def test_the_sum_runs_over_neurons_and_the_mean_over_the_batch():
    student, teacher = row(0.5, -0.5), row(-3, 3)
    assert boundary_loss(student.repeat(4, 1, 1, 1), teacher.repeat(4, 1, 1, 1)).item() == pytest.approx(4.5)


def test_a_neuron_at_zero_does_not_fire():
    assert boundary_loss(row(0.0), row(0.0), margin=2).item() == 4
    assert boundary_distance(row(0.0), row(-1.0)).item() == 0


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["double", "single"])
@pytest.mark.parametrize("margin", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_it_is_the_cases_written_out(shape, margin, dtype, close):
    student, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    assert boundary_loss(student, teacher, margin=margin).item() == pytest.approx(
        naive(student, teacher, margin), abs=close
    )


def test_a_student_beyond_the_margin_has_nothing_to_learn():
    teacher = maps(3, 4, 2, 2)
    student = (teacher.sign() * 1.5).requires_grad_()
    value = boundary_loss(student, teacher)
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() == 0


def test_distance_is_the_share_of_neurons_that_differ():
    """Of four neurons, the first and the last fire in one map only."""
    assert boundary_distance(row(1, 1, -1, -1), row(-1, 2, -2, 1)).item() == 0.5
    assert not boundary_distance(row(1.0).requires_grad_(), row(2.0)).requires_grad


def test_gradients_are_right_and_none_reaches_the_teacher():
    student, teacher = maps(2, 3, 2, 3).requires_grad_(), maps(2, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: boundary_loss(s, teacher.detach()), student)
    boundary_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (maps(1, 1, 1, 1), maps(1, 2, 1, 1, seed=1)),
        (maps(2, 3, 7, 5), maps(2, 4, 3, 5, seed=1)),
        (maps(2, 3, 3, 2), maps(2, 3, 6, 4, seed=1)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4)),
    ],
    ids=["one of each", "odd and larger", "smaller", "all zero"],
)
def test_value_and_gradient_are_finite(student, teacher):
    student = student.clone().requires_grad_()
    boundaries, seen = objective("early"), lesson({"early": student}, {"early": teacher})
    boundaries.build(seen)
    value = boundaries(seen)
    value.backward()
    assert value.shape == () and value.isfinite() and student.grad.isfinite().all()


def test_the_deepest_tap_weighs_one_and_each_before_it_half_of_the_next():
    """Three taps with a loss of 4.5 each and no connectors: 3/1000 · 4.5 · (1/4 + 1/2 + 1)."""
    taps = {name: row(0.5, -0.5) for name in "abc"}
    seen = lesson(taps, {name: row(-3, 3) for name in taps})
    boundaries = objective(*taps)
    boundaries.build(seen)
    assert boundaries(seen).item() == pytest.approx(3 / 1000 * 4.5 * 1.75)
    assert boundaries.observed["activation_boundary/differing"].item() == 1


def test_a_map_as_wide_as_the_teachers_is_compared_as_it_is():
    seen = lesson(
        {"early": maps(2, 3, 4, 4), "late": maps(2, 3, 4, 4)}, {"early": maps(2, 3, 4, 4), "late": maps(2, 5, 4, 4)}
    )
    boundaries = objective()
    boundaries.build(seen)
    assert parameters(boundaries.connectors[0]) == 0
    assert parameters(boundaries.connectors[1]) == 3 * 5 + 2 * 5


def test_training_changes_the_student_and_all_connectors_and_no_teacher():
    room, boundaries = Classroom(), objective()
    assert boundaries.needs.student_taps == boundaries.needs.teacher_taps == TAPS
    room.build(boundaries)
    assert parameters(boundaries) == (3 * 5 + 2 * 5) + (4 * 6 + 2 * 6)
    owned = {f"objective.{name}" for name, _ in boundaries.named_parameters()}
    assert room.changed_by_training(boundaries) == room.students() | owned
    assert not boundaries.observed["activation_boundary/differing"].requires_grad


def test_the_boundaries_are_learned_first_and_leave_no_objective_behind():
    options = features.ActivationBoundary(taps=TAPS, pretraining_epochs=7)
    plan = from_options(options, SETTING)
    assert isinstance(plan.first, ActivationBoundaries) and plan.then is None


def test_a_state_that_is_put_back_gives_the_same_loss():
    room, boundaries, again = Classroom(), objective(), objective()
    room.build(boundaries)
    room.changed_by_training(boundaries)
    room.build(again)
    again.load_state_dict(boundaries.state_dict())
    seen = room.lesson()
    assert torch.equal(again.eval()(seen), boundaries.eval()(seen))


def test_a_tap_that_is_no_map_is_refused_by_name():
    with pytest.raises(SpecInvalid, match="tap 'embedding' gives 4 for each image"):
        Classroom().build(objective("embedding"))
