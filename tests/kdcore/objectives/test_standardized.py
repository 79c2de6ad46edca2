import statistics

import pytest
import torch
from torch import nn

from kdcore.lesson import Lesson, Needs
from kdcore.objectives.dist import CorrelationKd
from kdcore.objectives.dkd import DecoupledKd
from kdcore.objectives.kd import KnowledgeDistillation, kd_kl_loss
from kdcore.objectives.nkd import NormalizedKd
from kdcore.objectives.objective import Objective
from kdcore.objectives.standardized import Standardized, standardize
from kdcore.objectives.weighted import WeightedSum
from kdcore.spec.methods.response import Dist, Dkd, Kd, Nkd
from tests.kdcore.objectives.lessons import lesson, normal, setting

SETTING = setting(temperature=2.0)
ON_LOGITS = {
    "kd": lambda: KnowledgeDistillation(Kd(), SETTING),
    "cross_entropy": lambda: KnowledgeDistillation(Kd(form="cross_entropy"), SETTING),
    "logits_l2": lambda: KnowledgeDistillation(Kd(form="logits_l2"), SETTING),
    "probabilities_l2": lambda: KnowledgeDistillation(Kd(form="probabilities_l2"), SETTING),
    "dkd": lambda: DecoupledKd(Dkd(warmup_epochs=20), SETTING),
    "nkd": lambda: NormalizedKd(Nkd(), SETTING),
    "dist": lambda: CorrelationKd(Dist(), SETTING),
}


def with_labels(student: torch.Tensor, teacher: torch.Tensor) -> Lesson:
    return lesson(student, teacher, labels=torch.arange(len(student)) % student.shape[1])


class Recorder(Objective):
    """Keeps the lessons that it gets."""

    needs = Needs(("layer1",), ("layer1",), ("bn1",), input_gradient=True)

    def build(self, lesson: Lesson) -> None:
        self.built_with = lesson
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, lesson: Lesson) -> torch.Tensor:
        self.last = lesson
        self.observed["figure"] = torch.tensor(3.0)
        return self.scale * lesson.student.logits.sum()


def test_standardize_equals_a_value_computed_by_hand():
    """(1, 2, 3) has mean 2 and unbiased standard deviation 1."""
    assert standardize(torch.tensor([[1.0, 2.0, 3.0]])).tolist()[0] == pytest.approx([-1, 0, 1], abs=1e-6)


def test_standardize_leaves_only_the_order_of_two_classes():
    """(a, b) has unbiased standard deviation |a - b| / √2: its members are 1/√2 on either side of the mean."""
    root = 0.5**0.5
    assert standardize(torch.tensor([[5.0, 1.0]])).tolist()[0] == pytest.approx([root, -root])


@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (4, 100)])
def test_standardize_equals_the_formula_sample_by_sample(shape):
    rows = normal(*shape)
    for row, result in zip(rows.tolist(), standardize(rows).tolist(), strict=True):
        mean, deviation = statistics.fmean(row), statistics.stdev(row)
        assert result == pytest.approx([(z - mean) / (deviation + 1e-7) for z in row], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3e4])
@pytest.mark.parametrize("classes", [1, 2, 3, 100])
def test_standardize_makes_equal_logits_zero_with_a_gradient_of_ordinary_size(constant, classes, dtype):
    equal = torch.full((2, classes), constant, dtype=dtype, requires_grad=True)
    value = standardize(equal)
    (value * torch.arange(classes)).sum().backward()
    assert value.abs().max() == 0
    centred = torch.arange(classes) - (classes - 1) / 2
    assert torch.allclose(equal.grad, centred.to(dtype).expand(2, -1), rtol=1e-5, atol=1e-5)


def test_standardize_loses_no_precision_far_from_zero():
    rows = torch.tensor([[0.0, 1.0, 3.0]])
    assert torch.allclose(standardize(rows + 4096), standardize(rows), atol=1e-6)


def test_standardized_changes_the_logits_of_a_lesson_and_nothing_else():
    recorder = Recorder()
    wrapped, given = Standardized(recorder), with_labels(normal(3, 4), normal(3, 4, seed=1))
    wrapped.build(given)
    wrapped(given)
    for seen in (recorder.built_with, recorder.last):
        assert torch.equal(seen.student.logits, standardize(given.student.logits))
        assert torch.equal(seen.teacher.logits, standardize(given.teacher.logits))
        assert seen.student.taps is given.student.taps and seen.teacher.taps is given.teacher.taps
        assert seen.batch is given.batch


def test_standardized_needs_owns_and_observes_what_its_objective_does():
    recorder = Recorder()
    wrapped = Standardized(recorder)
    wrapped.build(with_labels(normal(1, 2), normal(1, 2)))
    wrapped(with_labels(normal(1, 2), normal(1, 2)))
    assert wrapped.needs == recorder.needs
    assert [*wrapped.parameters()] == [recorder.scale]
    assert wrapped.observed["figure"] == 3


def test_standardized_observes_what_a_sum_observes():
    """A sum makes a new dict of figures at each forward pass."""
    wrapped, given = Standardized(WeightedSum([("recorder", 1.0, Recorder())])), with_labels(normal(1, 2), normal(1, 2))
    wrapped.build(given)
    for _ in range(2):
        value = wrapped(given)
        assert wrapped.observed == {"recorder": value.detach(), "figure": torch.tensor(3.0)}


def test_standardized_kd_is_the_papers():
    student, teacher = normal(6, 7), normal(6, 7, seed=1)
    by_hand = kd_kl_loss(standardize(student), standardize(teacher), temperature=2)
    assert Standardized(ON_LOGITS["kd"]())(with_labels(student, teacher)).item() == by_hand.item()


@pytest.mark.parametrize("method", ON_LOGITS)
def test_standardized_objectives_do_not_depend_on_scale_and_shift(method):
    student, teacher, compare = normal(6, 9), normal(6, 9, seed=1), Standardized(ON_LOGITS[method]())
    plain = compare(with_labels(student, teacher))
    assert compare(with_labels(3 * student + 5, 0.5 * teacher - 1)).item() == pytest.approx(plain.item(), rel=1e-5)
