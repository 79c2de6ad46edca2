import itertools

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.objectives import fitnet
from kdcore.objectives.fitnet import Hints, from_options, hint_loss
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.spec.methods.features import FitNet
from tests.kdcore.objectives.feature_pairs import (
    SETTING,
    UP_TO_DEEP,
    Looker,
    changed_by_training,
    loss_survives_a_round_trip,
    under,
)
from tests.kdcore.objectives.lessons import lesson, maps, parameters

REGRESSOR = ["regressor.0.weight"] + [
    f"regressor.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
]


def hints(tap: str = "deep", regressor: str = "conv") -> Hints:
    return Hints(FitNet(tap=tap, regressor=regressor), SETTING)


def looks(student: torch.Tensor, teacher: torch.Tensor):
    return lesson({"deep": student}, {"deep": teacher})


def test_hint_loss_worked_out_by_hand():
    """Differences 1, 2, 0 and 3 have squares 1 + 4 + 0 + 9 = 14, and a mean of 14 / 4."""
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0]])
    assert hint_loss(student.view(1, 1, 2, 2), teacher.view(1, 1, 2, 2)).item() == 3.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 4, 5), (2, 7, 1, 3)], ids=str)
def test_hint_loss_agrees_with_loops(shape, dtype, tolerance):
    student, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    places = list(itertools.product(*map(range, shape)))
    by_loops = sum((student[place].item() - teacher[place].item()) ** 2 for place in places) / len(places)
    value = hint_loss(student, teacher)
    assert value.dtype == dtype and value.item() == pytest.approx(by_loops, abs=tolerance)


def test_hint_loss_has_the_right_gradient_which_never_reaches_the_teacher():
    student, teacher = maps(2, 3, 2, 3).requires_grad_(), maps(2, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda student: hint_loss(student, teacher.detach()), student)
    hint_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("same", [maps(3, 4, 5, 2), torch.zeros(1, 1, 1, 1)], ids=["random", "one zero"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(same):
    student = same.clone().requires_grad_()
    value = hint_loss(student, same)
    value.backward()
    assert value.item() == 0 and not student.grad.any()


@pytest.mark.parametrize(
    ("student", "teacher", "regressor", "weights"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), "conv", 3 * 5 + 2 * 5),
        ((2, 3, 7, 5), (2, 5, 4, 8), "conv", 3 * 5 + 2 * 5),
        ((2, 4, 4, 4), (2, 4, 4, 4), "conv", 4 * 4 + 2 * 4),
        ((2, 6), (2, 8), "conv", 6 * 8 + 2 * 8),
        ((2, 6, 3, 3), (2, 8), "conv", 6 * 8 + 2 * 8),
        ((2, 3, 4, 4), (2, 5, 2, 3), "linear", 48 * 30 + 2 * 30),
        ((2, 6), (2, 8), "linear", 6 * 8 + 2 * 8),
        ((2, 1, 1, 1), (2, 1, 1, 1), "conv", 3),
    ],
    ids=["maps", "maps of odd sizes", "equal widths", "embeddings", "map to embedding", "linear", "linear 2d", "one"],
)
def test_the_regressor_has_the_papers_parameters_and_fits(student, teacher, regressor, weights):
    objective = hints(regressor=regressor)
    student, teacher = maps(*student).requires_grad_(), maps(*teacher, seed=1)
    objective.build(looks(student, teacher))
    assert parameters(objective) == weights
    assert {p.dtype for p in objective.parameters()} == {torch.float64}
    value = objective(looks(student, teacher))
    value.backward()
    assert value.shape == () and value.isfinite()
    assert student.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in objective.parameters())


def test_one_image_of_one_place_is_regressed_by_the_running_statistics():
    """One value has no variance; with none seen yet the batch norm hands the projection on as it is."""
    objective = hints()
    student, teacher = maps(1, 1, 1, 1), maps(1, 1, 1, 1, seed=1)
    objective.build(looks(student, teacher))
    expected = (objective.regressor[0](student) / (1 + 1e-5) ** 0.5 - teacher).square().item()
    assert objective(looks(student, teacher)).item() == pytest.approx(expected)


@pytest.mark.parametrize("regressor", ["conv", "linear"])
def test_a_large_hint_is_learned_at_the_recipes_weight_and_rate(regressor):
    """Beta 100 and a rate of 0.05 blow a bare projection up: the batch norm is what lets them stand."""
    objective, values = hints(regressor=regressor), []
    student, teacher = maps(16, 8, 4, 4).relu() * 3, maps(16, 8, 4, 4, seed=1).relu() * 3
    objective.build(looks(student, teacher))
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss = 100 * objective(looks(student, teacher))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] and max(values) < 100 * values[0]


@pytest.mark.parametrize("regressor", ["conv", "linear"])
def test_training_changes_the_student_up_to_the_guided_layer_and_the_regressor_alone(regressor):
    changed = changed_by_training(hints(regressor=regressor), Looker(3, 4, seed=0), Looker(5, 6, seed=1))
    assert changed == UP_TO_DEEP | under("objective", REGRESSOR)


@pytest.mark.parametrize("regressor", ["conv", "linear"])
def test_its_state_resumes_it(regressor):
    student, teacher = Looker(3, 4, seed=0), Looker(5, 6, seed=1)
    assert loss_survives_a_round_trip(hints(regressor=regressor), hints(regressor=regressor), student, teacher)


def test_it_asks_for_the_guided_layer_and_the_hint():
    objective = hints(tap={"student": "layer1", "teacher": "layer2"})
    assert (objective.needs.student_taps, objective.needs.teacher_taps) == (("layer1",), ("layer2",))


def test_what_is_no_map_is_refused():
    with pytest.raises(SpecInvalid, match=r"tap 'deep' gives 4 x 5 for each image, where a map"):
        hints().build(looks(maps(2, 4, 5), maps(2, 4, 5, 5)))


def test_a_linear_regressor_beyond_all_memory_is_refused(monkeypatch):
    monkeypatch.setattr(fitnet, "LARGEST_LINEAR", 47 * 30)
    with pytest.raises(SpecInvalid, match=r"from tap 'deep' \(48 numbers for each image\) .* 1440 weights") as refusal:
        hints(regressor="linear").build(looks(maps(2, 3, 4, 4), maps(2, 5, 2, 3)))
    assert "conv" in refusal.value.hint


def test_two_stages_show_the_hint_first():
    stages = from_options(FitNet(tap="deep", stages="two"), SETTING)
    assert isinstance(stages.first, Hints) and isinstance(stages.then, KnowledgeDistillation)
