import math

import pytest
import torch
from torch import nn

from kdcore.classifier import Classifier
from kdcore.lesson import Needs
from kdcore.teacher import FrozenTeacher, TeacherEnsemble
from tests.kdcore.tiny import batch, linear, says

BATCH = batch([0, 1, 2, 0])


def frozen() -> FrozenTeacher:
    return FrozenTeacher(Classifier(nn.Sequential(nn.Conv2d(1, 2, 4), nn.BatchNorm2d(2), nn.Flatten()), [0.5], [0.5]))


def test_train_mode_does_not_reach_it():
    teacher = frozen()
    nn.ModuleList([teacher]).train()
    statistics = teacher.classifier.network[1].running_mean.clone()
    teacher(BATCH)
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(teacher.classifier.network[1].running_mean, statistics)


def test_it_has_no_parameter_to_train_and_gives_no_gradient():
    teacher = frozen()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(BATCH).logits.requires_grad


def test_it_shows_the_taps_the_layers_and_the_gradient_that_it_is_asked_for():
    teacher = frozen()
    bare = teacher(BATCH)
    assert bare.taps == {} and bare.layers == {} and bare.input_gradient is None
    teacher.show(Needs(student_taps=("5",), teacher_taps=("0",), teacher_layers=("1",), input_gradient=True))
    view = teacher(batch([0, 1, 1, 0]))
    assert set(view.taps) == {"0"} and view.layers == {"1": teacher.classifier.network[1]}
    assert view.input_gradient.shape == (4, 1, 4, 4) and view.input_gradient.abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in (view.logits, view.taps["0"], view.input_gradient))
    teacher.show(Needs())
    assert teacher(BATCH).taps == {} and teacher(BATCH).input_gradient is None


def ensemble(*teachers: Classifier, weights=(1, 1), temperature: float = 1.0) -> TeacherEnsemble:
    return TeacherEnsemble([FrozenTeacher(teacher) for teacher in teachers], weights, temperature)


def test_probabilities_are_averaged_not_logits():
    """(0.9 + 0.5) / 2 = 0.7. The mean of logits would be (log 9 + 0) / 2 = log 3: 0.75."""
    view = ensemble(says(0.9, 0.1), says(0.5, 0.5))(BATCH)
    assert view.logits.softmax(1)[0].tolist() == pytest.approx([0.7, 0.3], rel=1e-6)


def test_weights_are_shares_whatever_they_sum_to():
    """(3 · 0.9 + 1 · 0.5) / 4 = 0.8"""
    for weights in ((3, 1), (0.3, 0.1)):
        view = ensemble(says(0.9, 0.1), says(0.5, 0.5), weights=weights)(BATCH)
        assert view.logits.softmax(1)[0].tolist() == pytest.approx([0.8, 0.2], rel=1e-6)


def test_softened_by_its_temperature_its_answer_is_the_mean_of_softened_answers():
    """T = 2 takes square roots of odds: 9 : 1 becomes 3 : 1, so (0.75 + 0.5) / 2 = 0.625."""
    view = ensemble(says(0.9, 0.1), says(0.5, 0.5), temperature=2.0)(BATCH)
    assert (view.logits / 2).softmax(1)[0].tolist() == pytest.approx([0.625, 0.375], rel=1e-6)
    assert view.logits[0, 0].item() == pytest.approx(2 * math.log(0.625), rel=1e-6)


def test_images_are_averaged_one_by_one():
    first, second = linear(0), linear(1)
    view = ensemble(first, second, weights=(1, 2), temperature=4.0)(BATCH)
    softened = [(one(BATCH.inputs).logits / 4).softmax(1) for one in (first, second)]
    assert torch.allclose((view.logits / 4).softmax(1), softened[0] / 3 + softened[1] * 2 / 3, atol=1e-6)


def test_two_identical_teachers_teach_as_one():
    one, both = FrozenTeacher(linear(0)), ensemble(linear(0), linear(0), temperature=4.0)
    assert torch.allclose((both(BATCH).logits / 4).softmax(1), (one(BATCH).logits / 4).softmax(1), atol=1e-6)


def test_a_teacher_that_is_surely_wrong_leaves_no_infinity():
    view = ensemble(says(1e-30, 1), says(1, 1e-30))(BATCH)
    assert view.logits.isfinite().all() and view.logits.softmax(1)[0].tolist() == pytest.approx([0.5, 0.5])


def test_several_teachers_are_frozen_too():
    both = ensemble(linear(0), linear(1))
    nn.ModuleList([both]).train()
    assert not any(parameter.requires_grad for parameter in both.parameters())
    assert not any(member.training for member in both.members) and not both(BATCH).logits.requires_grad
