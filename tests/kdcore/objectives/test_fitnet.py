import itertools

import pytest
import torch

from base.errors import SpecInvalid
from kdcore.lesson import Lesson
from kdcore.objectives import fitnet
from kdcore.objectives.fitnet import Hints, from_options, hint_loss
from kdcore.objectives.kd import KnowledgeDistillation
from kdcore.spec.methods.features import FitNet
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters

both_regressors = pytest.mark.parametrize("regressor", ["conv", "linear"])


def hints(regressor: str = "conv") -> Hints:
    torch.manual_seed(0)
    return Hints(FitNet(tap="deep", regressor=regressor), SETTING)


def maps(student: torch.Tensor, teacher: torch.Tensor) -> Lesson:
    return lesson({"deep": student}, {"deep": teacher})


def test_hint_loss_equals_a_value_computed_by_hand():
    """Differences 1, 2, 0 and 3 have squares 1 + 4 + 0 + 9 = 14, and a mean of 14 / 4."""
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 4.0], [3.0, 1.0]])
    assert hint_loss(student.view(1, 1, 2, 2), teacher.view(1, 1, 2, 2)).item() == 3.5


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 4, 5), (2, 7, 1, 3)], ids=str)
def test_hint_loss_equals_plain_loops(shape):
    student, teacher = normal(*shape), normal(*shape, seed=1)
    places = list(itertools.product(*map(range, shape)))
    by_loops = sum((student[place].item() - teacher[place].item()) ** 2 for place in places) / len(places)
    assert hint_loss(student, teacher).item() == pytest.approx(by_loops, abs=1e-9)


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
def test_hints_have_the_papers_regressor(student, teacher, regressor, weights):
    student, teacher = normal(*student).requires_grad_(), normal(*teacher, seed=1)
    objective = built(hints(regressor), maps(student, teacher))
    assert parameters(objective) == weights
    assert {p.dtype for p in objective.parameters()} == {torch.float64}
    value = objective(maps(student, teacher))
    value.backward()
    assert student.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in objective.parameters())


@both_regressors
def test_hints_learn_a_large_hint_at_the_recipes_weight_and_rate(regressor):
    """Beta 100 and a rate of 0.05: without the batch norm the loss would become infinite."""
    seen = maps(normal(16, 8, 4, 4).relu() * 3, normal(16, 8, 4, 4, seed=1).relu() * 3)
    objective, values = built(hints(regressor), seen), []
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        loss = 100 * objective(seen)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] and max(values) < 100 * values[0]


def test_hints_refuse_a_linear_regressor_beyond_all_memory(monkeypatch):
    monkeypatch.setattr(fitnet, "LARGEST_LINEAR", 47 * 30)
    with pytest.raises(SpecInvalid, match=r"from tap 'deep' \(48 numbers for each image\) .* 1440 weights") as refusal:
        hints("linear").build(maps(normal(2, 3, 4, 4), normal(2, 5, 2, 3)))
    assert "conv" in refusal.value.hint


def test_from_options_puts_hints_beside_the_labels_or_first():
    assert isinstance(from_options(FitNet(tap="deep"), SETTING), Hints)
    stages = from_options(FitNet(tap="deep", stages="two"), SETTING)
    assert isinstance(stages.first, Hints) and isinstance(stages.then, KnowledgeDistillation)
