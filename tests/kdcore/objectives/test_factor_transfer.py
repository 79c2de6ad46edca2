import itertools
import math

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from kdcore.lesson import Lesson
from kdcore.objectives.factor_transfer import FactorTransfer, Paraphraser, Paraphrasing, factor_loss, from_options
from kdcore.objectives.objective import TwoStages
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters

both_powers = pytest.mark.parametrize("p", [1, 2])


def stages_of(p: int = 1) -> TwoStages:
    torch.manual_seed(0)
    return from_options(features.FactorTransfer(tap="late", p=p), SETTING)


def maps(student: tuple[int, ...] = (2, 4, 3, 3)) -> Lesson:
    return lesson({"late": normal(*student)}, {"late": normal(2, 6, 3, 3, seed=1)})


def naive(student: torch.Tensor, teacher: torch.Tensor, p: int) -> float:
    n, *inner = student.shape
    total = 0.0
    for i in range(n):
        places = list(itertools.product(*map(range, inner)))
        lengths = [math.sqrt(sum(side[i][place].item() ** 2 for place in places)) for side in (student, teacher)]
        for place in places:
            total += abs(student[i][place].item() / lengths[0] - teacher[i][place].item() / lengths[1]) ** p
    return total / student.numel()


def test_factor_loss_equals_a_value_computed_by_hand():
    """(3, 4) has length 5, so (0.6, 0.8); against (1, 0) that is 0.4 and 0.8 off. p = 2 is a mean of squares."""
    student, teacher = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([7.0, 0.0]).reshape(1, 2, 1, 1)
    assert factor_loss(student, teacher).item() == pytest.approx((0.4 + 0.8) / 2)
    assert factor_loss(student, teacher, p=2).item() == pytest.approx((0.16 + 0.64) / 2)


@both_powers
@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_factor_loss_equals_the_mean_number_by_number(shape, p):
    student, teacher = normal(*shape), normal(*shape, seed=1)
    assert factor_loss(student, teacher, p=p).item() == pytest.approx(naive(student, teacher, p), abs=1e-9)


@both_powers
def test_factor_loss_of_a_scaled_teacher_is_zero(p):
    teacher = normal(3, 4, 2, 2)
    assert factor_loss(7 * teacher, teacher, p=p).item() == pytest.approx(0, abs=1e-12)


@both_powers
def test_factor_loss_sends_no_gradient_to_a_factor_of_zeros(p):
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    factor_loss(student, normal(2, 3, 4, 4, dtype=torch.float32), p=p).backward()
    assert not student.grad.any()


def test_paraphraser_and_translator_are_as_large_as_the_papers():
    """3x3 with bias; six channels and their half."""
    paraphraser = Paraphraser(0.5)
    paraphraser.build(torch.zeros(1, 6, 3, 3))
    encoder = (9 * 6 * 6 + 6) + (9 * 6 * 3 + 3) + (9 * 3 * 3 + 3)
    decoder = (9 * 3 * 3 + 3) + (9 * 3 * 6 + 6) + (9 * 6 * 6 + 6)
    assert (parameters(paraphraser.encoder), parameters(paraphraser.decoder)) == (encoder, decoder)
    then = built(stages_of().then, maps())
    assert parameters(then.translator) == (9 * 4 * 4 + 4) + (9 * 4 * 3 + 3) + (9 * 3 * 3 + 3)


@pytest.mark.parametrize(("rate", "channels"), [(0.1, 1), (0.5, 3), (1.5, 9)], ids=str)
def test_paraphraser_has_the_rates_channels_and_at_least_one(rate, channels):
    paraphraser = Paraphraser(rate)
    paraphraser.build(torch.zeros(1, 6, 3, 5))
    assert paraphraser.encoder(torch.zeros(1, 6, 3, 5)).shape == (1, channels, 3, 5)
    assert paraphraser(torch.zeros(1, 6, 3, 5)).shape == (1, 6, 3, 5)


def test_from_options_gives_both_stages_of_factor_transfer_one_paraphraser():
    stages = stages_of()
    assert isinstance(stages.first, Paraphrasing) and isinstance(stages.then, FactorTransfer)
    assert stages.first.paraphraser is stages.then.paraphraser


def test_paraphrasing_minimises_the_mean_absolute_error_of_the_reconstruction():
    first, seen = built(stages_of().first, maps()), maps()
    teacher = seen.teacher.taps["late"]
    assert first(seen).item() == pytest.approx((first.paraphraser(teacher) - teacher).abs().mean().item())


def test_factor_transfer_keeps_the_first_stages_paraphraser_frozen():
    """In whatever mode the rest is; a resumed job has it from the state."""
    stages, again = stages_of(), stages_of()
    built(stages.first, maps())
    before = {name: value.clone() for name, value in stages.first.paraphraser.state_dict().items()}
    built(stages.then, maps())
    assert all(value.equal(before[name]) for name, value in stages.then.paraphraser.state_dict().items())
    assert stages.then.train() is stages.then
    assert stages.then.training and stages.then.translator.training and not stages.then.paraphraser.training
    built(again.then, maps()).load_state_dict(stages.then.state_dict())
    assert all(value.equal(before[name]) for name, value in again.then.paraphraser.state_dict().items())
    for then in (stages.then, again.then):
        assert not any(p.requires_grad for p in then.paraphraser.parameters())
        assert all(p.requires_grad for p in then.translator.parameters())


@both_powers
@pytest.mark.parametrize("size", [(3, 3), (6, 4), (2, 1), (1, 7)], ids=str)
def test_factor_transfer_brings_the_translation_to_the_factors_size(size, p):
    seen = maps((2, 4, *size))
    then = built(stages_of(p).then, seen)
    translated = adaptive_avg_pool2d(then.translator(seen.student.taps["late"]), (3, 3))
    expected = factor_loss(translated, then.factor(seen.teacher.taps["late"]), p=p)
    assert then(seen).item() == pytest.approx(expected.item())
