import itertools
import math

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from base.errors import SpecInvalid
from kdcore.objectives.factor_transfer import FactorTransfer, Paraphraser, Paraphrasing, factor_loss, from_options
from kdcore.objectives.objective import TwoStages
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, Classroom, lesson, maps, parameters


def plan(tap: str = "late", p: int = 1, rate: float = 0.5) -> TwoStages:
    return from_options(features.FactorTransfer(tap=tap, p=p, rate=rate, pretraining_epochs=3), SETTING)


def naive(student, teacher, p) -> float:
    n, *inner = student.shape
    total = 0.0
    for i in range(n):
        places = list(itertools.product(*map(range, inner)))
        lengths = [math.sqrt(sum(side[i][place].item() ** 2 for place in places)) for side in (student, teacher)]
        for place in places:
            total += abs(student[i][place].item() / lengths[0] - teacher[i][place].item() / lengths[1]) ** p
    return total / student.numel()


def test_value_worked_out_by_hand():
    """(3, 4) has length 5, so (0.6, 0.8); against (1, 0) that is 0.4 and 0.8 off."""
    student, teacher = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([7.0, 0.0]).reshape(1, 2, 1, 1)
    assert factor_loss(student, teacher).item() == pytest.approx((0.4 + 0.8) / 2)
    assert factor_loss(student, teacher, p=2).item() == pytest.approx((0.16 + 0.64) / 2)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["double", "single"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_it_is_the_mean_written_out(shape, p, dtype, close):
    student, teacher = maps(*shape, dtype=dtype), maps(*shape, seed=1, dtype=dtype)
    assert factor_loss(student, teacher, p=p).item() == pytest.approx(naive(student, teacher, p), abs=close)


@pytest.mark.parametrize("p", [1, 2])
def test_a_student_that_scales_its_teacher_loses_nothing(p):
    teacher = maps(3, 4, 2, 2)
    assert factor_loss(7 * teacher, teacher, p=p).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_are_right_and_none_reaches_the_teacher(p):
    student, teacher = maps(2, 3, 2, 3).requires_grad_(), maps(2, 3, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: factor_loss(s, teacher.detach(), p=p), student)
    factor_loss(student, teacher, p=p).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (torch.zeros(2, 3, 4, 4), maps(2, 3, 4, 4, dtype=torch.float32)),
        (maps(2, 3, 4, 4, dtype=torch.float32), torch.zeros(2, 3, 4, 4)),
        (maps(1, 1, 1, 1), maps(1, 1, 1, 1, seed=1)),
    ],
    ids=["dead student", "dead teacher", "one of each"],
)
def test_a_factor_without_direction_is_no_trouble(student, teacher, p):
    student = student.clone().requires_grad_()
    value = factor_loss(student, teacher, p=p)
    value.backward()
    assert value.isfinite() and student.grad.abs().max() < 100


def test_the_modules_are_as_large_as_the_papers():
    """3x3 with bias; six channels and their half."""
    paraphraser = Paraphraser(0.5)
    paraphraser.build(torch.zeros(1, 6, 3, 3))
    encoder = (9 * 6 * 6 + 6) + (9 * 6 * 3 + 3) + (9 * 3 * 3 + 3)
    decoder = (9 * 3 * 3 + 3) + (9 * 3 * 6 + 6) + (9 * 6 * 6 + 6)
    assert (parameters(paraphraser.encoder), parameters(paraphraser.decoder)) == (encoder, decoder)
    room, then = Classroom(), plan().then
    room.build(then)
    assert parameters(then.translator) == (9 * 4 * 4 + 4) + (9 * 4 * 3 + 3) + (9 * 3 * 3 + 3)


@pytest.mark.parametrize(("rate", "channels"), [(0.1, 1), (0.5, 3), (1.5, 9)], ids=str)
def test_the_rate_sets_the_factors_channels_of_which_there_is_one_at_least(rate, channels):
    paraphraser = Paraphraser(rate)
    paraphraser.build(torch.zeros(1, 6, 3, 5))
    assert paraphraser.encoder(torch.zeros(1, 6, 3, 5)).shape == (1, channels, 3, 5)
    assert paraphraser(torch.zeros(1, 6, 3, 5)).shape == (1, 6, 3, 5)


def test_the_first_stage_reads_the_teacher_alone_and_the_second_both():
    stages = plan()
    assert isinstance(stages.first, Paraphrasing) and isinstance(stages.then, FactorTransfer)
    assert (stages.first.needs.student_taps, stages.first.needs.teacher_taps) == ((), ("late",))
    assert stages.then.needs.student_taps == stages.then.needs.teacher_taps == ("late",)
    assert stages.first.paraphraser is stages.then.paraphraser


def test_the_first_stage_minimises_the_mean_absolute_error_of_reconstruction():
    stages, teacher = plan(), maps(2, 4, 3, 3)
    seen = lesson({}, {"late": teacher})
    stages.first.build(seen)
    expected = (stages.first.paraphraser(teacher) - teacher).abs().mean()
    assert stages.first(seen).item() == pytest.approx(expected.item())


def test_the_first_stage_trains_the_paraphraser_alone_and_the_second_the_student_and_the_translator():
    room, stages = Classroom(), plan()
    room.build(stages.first)
    owned = {f"objective.paraphraser.{name}" for name, _ in stages.first.paraphraser.named_parameters()}
    assert room.changed_by_training(stages.first) == owned
    made = {name: value.clone() for name, value in stages.first.paraphraser.state_dict().items()}
    room.build(stages.then)
    assert all(torch.equal(value, made[name]) for name, value in stages.then.paraphraser.state_dict().items())
    owned = {f"objective.translator.{name}" for name, _ in stages.then.translator.named_parameters()}
    assert room.changed_by_training(stages.then) == room.students() | owned


def test_no_mode_wakes_the_frozen_paraphraser():
    room, stages = Classroom(), plan()
    room.build(stages.first)
    stages.first.train()
    room.build(stages.then)
    assert stages.then.train() is stages.then
    assert stages.then.training and stages.then.translator.training and not stages.then.paraphraser.training
    assert not any(p.requires_grad for p in stages.then.paraphraser.parameters())
    assert all(p.requires_grad for p in stages.then.translator.parameters())


def test_a_job_resumed_in_its_second_stage_has_the_paraphraser_of_its_first():
    room, stages, again = Classroom(), plan(), plan()
    room.build(stages.first)
    room.changed_by_training(stages.first)
    room.build(stages.then)
    room.changed_by_training(stages.then)
    room.build(again.then)
    again.then.load_state_dict(stages.then.state_dict())
    assert torch.equal(again.then(room.lesson()), stages.then(room.lesson()))
    assert not any(p.requires_grad for p in again.then.paraphraser.parameters())


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("size", [(3, 3), (6, 4), (2, 1), (1, 7)], ids=str)
def test_the_translation_is_brought_to_the_factors_size(size, p):
    student = maps(2, 3, *size).requires_grad_()
    then, seen = plan(p=p).then, lesson({"late": student}, {"late": maps(2, 4, 3, 3, seed=1)})
    then.build(seen)
    value = then(seen)
    value.backward()
    translated = adaptive_avg_pool2d(then.translator(student), (3, 3))
    assert value.item() == pytest.approx(factor_loss(translated, then.factor(seen.teacher.taps["late"]), p=p).item())
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_a_tap_that_is_no_map_is_refused_by_name():
    stages = plan("embedding")
    for stage, width in ((stages.first, 6), (stages.then, 4)):
        with pytest.raises(SpecInvalid, match=f"tap 'embedding' gives {width} for each image"):
            Classroom().build(stage)
