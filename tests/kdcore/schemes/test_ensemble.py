import math

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from kdcore import models
from kdcore.catalog import architecture
from kdcore.measure.evaluate import parameters
from kdcore.objectives import Setting, build
from kdcore.schemes.ensemble import NativeEnsemble, rampup
from kdcore.spec.methods.schemes import One
from tests.kdcore.tiny import batch, named

SIDES = {
    "convnet4": 8,
    "resnet8": 8,
    "resnet8x4": 8,
    "resnet8_option_a": 8,
    "vgg8": 8,
    "wrn_16_1": 8,
    "mobilenetv2_x0_5": 16,
    "shufflenetv1": 8,
    "shufflenetv2": 8,
}


def scheme(name: str = "convnet4", branches: int = 3, rampup_epochs: int = 0) -> NativeEnsemble:
    side = SIDES[name]
    return NativeEnsemble([named(name, seed) for seed in range(branches)], (side, side), rampup_epochs)


@pytest.mark.parametrize("name", SIDES)
def test_branches_share_the_trunk_and_the_first_one_is_the_plain_student(name):
    one = scheme(name, branches=2)
    first, second = (branch.network for branch in one.ensemble.network.branches)
    assert one.models["student"].network is first

    shared = {id(parameter) for parameter in first.parameters()} & {id(parameter) for parameter in second.parameters()}
    counted = {id(parameter) for parameter in one.ensemble.parameters()}
    gate = parameters(one.ensemble.network.gate)
    whole = architecture(name).parameters(3, 1)
    trunk = sum(parameter.numel() for parameter in first.parameters() if id(parameter) in shared)
    assert 0 < trunk < whole and len(counted) == len(list(one.ensemble.parameters()))
    assert parameters(first) == whole
    assert parameters(one.ensemble) == 2 * whole - trunk + gate

    plain = models.build(name, 3, 1)
    assert list(plain.state_dict()) == list(first.state_dict())
    plain.load_state_dict(first.state_dict(), strict=True)
    one.ensemble.eval()
    seen = one.ensemble(batch([0, 1, 2], side=SIDES[name]).inputs)
    alone = one.models["student"](batch([0, 1, 2], side=SIDES[name]).inputs)
    assert torch.equal(seen.taps["branches.0"], alone.logits)
    assert torch.allclose(plain.eval()(images(name)), first(images(name)), atol=1e-6)


def images(name: str) -> torch.Tensor:
    return torch.randn(2, 1, SIDES[name], SIDES[name], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["convnet4", "mobilenetv2_x0_5"])
def test_a_step_moves_the_trunk_that_is_exported(name):
    one = scheme(name, branches=2)
    done = one.run(batch([0, 1, 2, 0], side=SIDES[name]))
    done.views[1].logits.square().sum().backward()
    exported = one.models["student"].network
    moved = {path for path, parameter in exported.named_parameters() if parameter.grad is not None}
    own = {path for path, _ in exported.named_parameters()} - moved
    assert moved and own, "the second branch trains the trunk, and nothing of the first branch's own"
    last = "layer3." if name == "convnet4" else "blocks.6."
    assert any(path.startswith(last) for path in own) and not any(path.startswith(last) for path in moved)


def test_every_branch_and_the_ensemble_are_graded_and_the_ensemble_teaches_every_branch():
    done = scheme().run(batch([0, 1, 2, 0], side=8))
    *branches, ensemble = done.views
    assert len(branches) == 3 and [lesson.student for lesson in done.lessons] == branches
    for lesson in done.lessons:
        assert torch.equal(lesson.teacher.logits, ensemble.logits) and not lesson.teacher.logits.requires_grad
    assert ensemble.logits.requires_grad


def test_native_ensemble_the_ensemble_is_the_branches_weighed_by_a_gate_that_sums_to_one():
    one = scheme()
    one.ensemble.eval()
    network = one.ensemble.network
    inputs = batch([0, 1, 2, 0], side=8).inputs
    seen = one.ensemble(inputs)
    maps = network.trunk((inputs / 255 - 0.5) / 0.25)
    gate = network.gate(adaptive_avg_pool2d(maps, 1).flatten(1)).softmax(1)
    assert gate.shape == (4, 3) and torch.allclose(gate.sum(1), torch.ones(4))
    assert not torch.allclose(gate[0], gate[1]), "each image has weights of its own"
    by_hand = sum(gate[:, i : i + 1] * seen.taps[f"branches.{i}"] for i in range(3))
    assert torch.allclose(seen.logits, by_hand, atol=1e-6)


def test_native_ensemble_the_divergence_reaches_the_branches_and_never_the_gate():
    one = scheme()
    objective = build((One(),), Setting(3.0, 3, 1, torch.zeros(4).long(), torch.arange(4)))[-1]
    done = one.run(batch([0, 1, 2, 0], side=8))
    sum(lesson.share * objective(lesson) for lesson in done.lessons).backward()
    network = one.ensemble.network
    assert all(parameter.grad is None for parameter in network.gate.parameters())
    assert all(branch.network.fc.weight.grad.abs().sum() > 0 for branch in network.branches)


def test_native_ensemble_the_labels_reach_the_gate_through_the_ensemble():
    one = scheme()
    one.run(batch([0, 1, 2, 0], side=8)).views[-1].logits[:, 0].sum().backward()
    assert one.ensemble.network.gate[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("epoch", "weight"),
    [(1, math.exp(-5 * (1 - 1 / 80) ** 2)), (40, math.exp(-1.25)), (80, 1), (81, 1), (300, 1)],
    ids=str,
)
def test_rampup_the_weight_rises_as_in_the_authors_code(epoch, weight):
    assert rampup(epoch, 80) == pytest.approx(weight)
    assert rampup(torch.tensor(float(epoch)), 80).item() == pytest.approx(weight)
    (lesson, *_) = scheme(rampup_epochs=80).run(batch([0, 1, 2, 0], side=8, epoch=epoch - 1)).lessons
    assert lesson.share == pytest.approx(weight)


def test_rampup_without_a_ramp_the_weight_is_one_from_the_start():
    assert rampup(1, 0) == 1 == rampup(torch.tensor(1.0), 0)


def test_native_ensemble_making_it_moves_no_running_statistic():
    first = named("convnet4")
    before = first.network.layer1[1].running_mean.clone()
    NativeEnsemble([first, named("convnet4", 1)], (8, 8), 0)
    assert torch.equal(first.network.layer1[1].running_mean, before)


def test_the_trunk_runs_once_a_step():
    one, runs = scheme(), []
    one.models["student"].network.layer1.register_forward_hook(lambda *_: runs.append(1))
    one.run(batch([0, 1], side=8))
    assert len(runs) == 1
