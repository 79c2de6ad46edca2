import pytest
import torch
from torch import nn

from base.errors import SpecInvalid
from kdcore import models
from kdcore.catalog import architecture
from kdcore.lesson import EMBEDDING
from kdcore.measure.evaluate import parameters
from kdcore.schemes.exits import Exits
from tests.kdcore.tiny import batch, named

BATCH = batch([0, 1, 2, 0], side=8)


def scheme(name: str = "convnet4", side: int = 8) -> Exits:
    facts = architecture(name)
    return Exits(named(name), facts.taps[:-1], facts.embedding, 3, (side, side))


def convolutions(one: Exits) -> list[list[nn.Conv2d]]:
    return [[layer for layer in module.bottleneck if isinstance(layer, nn.Conv2d)] for module in one.exits]


def test_an_exit_halves_the_map_once_for_each_stage_that_it_leaves_out():
    """Maps of 8 and of 4 pixels; the first exit leaves out two stages, the second one."""
    layers = convolutions(scheme())
    strides = [[layer.stride[0] for layer in three] for three in layers]
    assert strides == [[1, 4, 1], [1, 2, 1]]
    assert strides == [[layer.kernel_size[0] for layer in three] for three in layers]


def test_exits_a_map_too_small_to_be_halved_so_often_becomes_one_place():
    """A VGG's maps on 8 pixels are 8, 4, 2 and 1 wide at its exits, which leave out 4, 3, 2 and 1 stages."""
    assert [three[1].stride[0] for three in convolutions(scheme("vgg8"))] == [8, 4, 2, 1]


def test_an_exit_narrows_to_a_quarter_and_ends_as_wide_as_the_deepest_features():
    """convnet4: stages of 4, 8 and 8 channels, an embedding of 8."""
    one = scheme()
    widths = [[(layer.in_channels, layer.out_channels) for layer in three] for three in convolutions(one)]
    assert widths == [[(4, 2), (2, 2), (2, 8)], [(8, 2), (2, 2), (2, 8)]]
    assert [module.classifier.in_features for module in one.exits] == [8, 8]


def test_the_deepest_is_graded_first_then_the_exits_and_teaches_each_of_them():
    done = scheme().run(BATCH)
    deepest, *early = done.views
    assert [lesson.student for lesson in done.lessons] == early and len(early) == 2
    for lesson in done.lessons:
        assert lesson.share == 1
        assert torch.equal(lesson.teacher.logits, deepest.logits)
        assert torch.equal(lesson.teacher.taps[EMBEDDING], deepest.taps["fc@in"])
        assert not lesson.teacher.logits.requires_grad and not lesson.teacher.taps[EMBEDDING].requires_grad
        assert lesson.student.taps[EMBEDDING].shape == lesson.teacher.taps[EMBEDDING].shape == (4, 8)


def test_the_gradient_of_an_exit_reaches_the_stages_below_it_and_none_above():
    one = scheme()
    (first, _) = one.run(BATCH).lessons
    (first.student.logits - first.teacher.logits).square().sum().backward()
    network = one.student.network
    assert network.layer1[0].weight.grad.abs().sum() > 0
    assert network.layer2[0].weight.grad is None and network.fc.weight.grad is None
    assert one.exits[0].classifier.weight.grad.abs().sum() > 0 and one.exits[1].classifier.weight.grad is None


def test_the_exits_learn_with_the_student_under_one_optimizer():
    one = scheme()
    (learner,) = one.learners()
    assert parameters(learner) == parameters(one.student) + parameters(one.exits)


def test_the_student_comes_out_without_its_exits():
    one = scheme()
    assert list(one.models) == ["student", "exit-1", "exit-2"]
    student = one.models["student"].network
    models.build("convnet4", 3, 1).load_state_dict(student.state_dict(), strict=True)
    assert parameters(student) == architecture("convnet4").parameters(3, 1)


def test_a_model_that_is_left_early_answers_as_its_exit_does():
    one = scheme()
    nn.ModuleList(one.learners()).eval()
    early = one.run(BATCH).views[1:]
    for number, view in enumerate(early, 1):
        assert torch.equal(one.models[f"exit-{number}"](BATCH.inputs).logits, view.logits)


def test_exits_making_it_moves_no_running_statistic():
    student = named("convnet4")
    Exits(student, ["layer1"], "fc@in", 3, (8, 8))
    assert student.network.layer1[1].running_mean.abs().sum() == 0


def test_an_exit_that_is_no_map_is_refused():
    with pytest.raises(SpecInvalid, match="exit 'fc@in' gives 8 for each image"):
        Exits(named("convnet4"), ["fc@in"], "fc@in", 3, (8, 8))
