import copy
import statistics

import pytest
import torch
from torch import nn

from kdcore.lesson import Batch, Lesson, Needs, View
from kdcore.objectives.dist import CorrelationKd
from kdcore.objectives.dkd import DecoupledKd
from kdcore.objectives.kd import KnowledgeDistillation, kd_kl_loss
from kdcore.objectives.nkd import NormalizedKd
from kdcore.objectives.objective import Objective, Setting
from kdcore.objectives.standardized import Standardized, standardize
from kdcore.objectives.weighted import WeightedSum
from kdcore.spec.methods.response import Dist, Dkd, Kd, Nkd

SETTING = Setting(2.0, 7, 240, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
ON_LOGITS = {
    "kd": lambda: KnowledgeDistillation(Kd(), SETTING),
    "cross_entropy": lambda: KnowledgeDistillation(Kd(form="cross_entropy"), SETTING),
    "logits_l2": lambda: KnowledgeDistillation(Kd(form="logits_l2"), SETTING),
    "probabilities_l2": lambda: KnowledgeDistillation(Kd(form="probabilities_l2"), SETTING),
    "dkd": lambda: DecoupledKd(Dkd(warmup_epochs=20), SETTING),
    "nkd": lambda: NormalizedKd(Nkd(), SETTING),
    "dist": lambda: CorrelationKd(Dist(), SETTING),
}


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lesson(student: torch.Tensor, teacher: torch.Tensor) -> Lesson:
    labels = torch.arange(len(student)) % student.shape[1]
    taps = {"layer1": torch.ones(1)}
    return Lesson(View(student, taps), View(teacher, taps), Batch(torch.empty(0), labels, labels))


class Recorder(Objective):
    """Keeps what it is shown."""

    needs = Needs(("layer1",), ("layer1",), ("bn1",), input_gradient=True)

    def build(self, lesson: Lesson) -> None:
        self.built_with = lesson
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, lesson: Lesson) -> torch.Tensor:
        self.shown = lesson
        self.observed["figure"] = torch.tensor(3.0)
        return self.scale * lesson.student.logits.sum()


def test_worked_out_by_hand():
    """(1, 2, 3) has mean 2 and unbiased standard deviation 1."""
    assert standardize(torch.tensor([[1.0, 2.0, 3.0]])).tolist()[0] == pytest.approx([-1, 0, 1], abs=1e-6)


def test_two_classes_are_left_with_their_order_alone():
    """(a, b) has unbiased standard deviation |a - b| / √2: its members are 1/√2 on either side of the mean."""
    root = 0.5**0.5
    assert standardize(torch.tensor([[5.0, 1.0]])).tolist()[0] == pytest.approx([root, -root])


@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (4, 100)])
def test_agrees_with_the_formula_sample_by_sample(shape):
    rows = logits(*shape)
    for row, answer in zip(rows.tolist(), standardize(rows).tolist(), strict=True):
        mean, deviation = statistics.fmean(row), statistics.stdev(row)
        assert answer == pytest.approx([(z - mean) / (deviation + 1e-7) for z in row], rel=1e-9)
    assert torch.allclose(standardize(rows.float()).double(), standardize(rows), atol=1e-5)


def test_the_gradient_is_that_of_the_value():
    assert torch.autograd.gradcheck(standardize, logits(3, 5).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("constant", [0.0, 0.1, -7.3e4])
@pytest.mark.parametrize("classes", [1, 2, 3, 100])
def test_equal_logits_become_zero_with_a_gradient_of_ordinary_size(constant, classes, dtype):
    equal = torch.full((2, classes), constant, dtype=dtype, requires_grad=True)
    value = standardize(equal)
    (value * torch.arange(classes)).sum().backward()
    assert value.abs().max() == 0
    centred = torch.arange(classes) - (classes - 1) / 2
    assert torch.allclose(equal.grad, centred.to(dtype).expand(2, -1), rtol=1e-5, atol=1e-5)


def test_a_shift_far_from_zero_costs_no_precision():
    rows = torch.tensor([[0.0, 1.0, 3.0]])
    assert torch.allclose(standardize(rows + 4096), standardize(rows), atol=1e-6)


def test_the_wrapped_objective_sees_standardised_logits_and_everything_else_as_it_was():
    recorder = Recorder()
    wrapped, seen = Standardized(recorder), lesson(logits(3, 4), logits(3, 4, seed=1))
    wrapped.build(seen)
    wrapped(seen)
    for shown in (recorder.built_with, recorder.shown):
        assert torch.equal(shown.student.logits, standardize(seen.student.logits))
        assert torch.equal(shown.teacher.logits, standardize(seen.teacher.logits))
        assert shown.student.taps is seen.student.taps and shown.teacher.taps is seen.teacher.taps
        assert shown.batch is seen.batch


def test_the_wrapper_asks_for_what_the_wrapped_objective_asks_for():
    recorder = Recorder()
    wrapped = Standardized(recorder)
    wrapped.build(lesson(logits(1, 2), logits(1, 2)))
    wrapped(lesson(logits(1, 2), logits(1, 2)))
    assert (wrapped.needs.student_taps, wrapped.needs.teacher_taps) == (("layer1",), ("layer1",))
    assert wrapped.needs.teacher_layers == ("bn1",) and wrapped.needs.input_gradient
    assert [*wrapped.parameters()] == [recorder.scale]
    assert wrapped.observed["figure"] == 3


def test_standardized_observes_what_a_sum_observes():
    """A sum makes a new dict of figures at each forward pass."""
    recorder = Recorder()
    wrapped = Standardized(WeightedSum([("recorder", 1.0, recorder)]))
    shown = lesson(logits(1, 2), logits(1, 2))
    wrapped.build(shown)
    for _ in range(2):
        value = wrapped(shown)
        assert wrapped.observed == {"recorder": value.detach(), "figure": torch.tensor(3.0)}


def test_kd_behind_it_is_the_papers():
    student, teacher = logits(6, 7), logits(6, 7, seed=1)
    by_hand = kd_kl_loss(standardize(student), standardize(teacher), temperature=2)
    assert Standardized(ON_LOGITS["kd"]())(lesson(student, teacher)).item() == by_hand.item()


@pytest.mark.parametrize("method", ON_LOGITS)
def test_scale_and_shift_of_either_side_are_hidden(method):
    student, teacher, compare = logits(6, 9), logits(6, 9, seed=1), Standardized(ON_LOGITS[method]())
    plain = compare(lesson(student, teacher))
    assert compare(lesson(3 * student + 5, 0.5 * teacher - 1)).item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("method", ON_LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("scale", "shape"),
    [(1.0, (6, 7)), (1.0, (5, 2)), (1.0, (1, 7)), (1e4, (6, 7)), (1e-6, (6, 7)), (0.0, (6, 7))],
    ids=["ordinary", "two classes", "batch of one", "huge", "tiny", "all zero"],
)
def test_any_objective_on_logits_stays_finite_behind_it(method, scale, shape, dtype):
    student = (scale * logits(*shape, dtype=dtype)).requires_grad_()
    teacher = logits(*shape, seed=1, dtype=dtype)
    value = Standardized(ON_LOGITS[method]())(lesson(student, teacher))
    value.backward()
    assert value.shape == () and value.dtype == dtype and value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("method", ON_LOGITS)
def test_two_steps_change_the_student_and_nothing_of_the_teacher(method):
    torch.manual_seed(0)
    student, teacher, inputs = nn.Linear(5, 4), nn.Linear(5, 4), torch.randn(8, 5)
    before, compare = copy.deepcopy((student, teacher)), Standardized(ON_LOGITS[method]())
    optimizer = torch.optim.SGD([*student.parameters(), *compare.parameters()], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        compare(lesson(student(inputs), teacher(inputs).detach())).backward()
        optimizer.step()
    assert not torch.equal(student.weight, before[0].weight) and not torch.equal(student.bias, before[0].bias)
    assert torch.equal(teacher.weight, before[1].weight) and torch.equal(teacher.bias, before[1].bias)
