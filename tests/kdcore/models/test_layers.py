"""The three forms of a network against each other: eager is the reference of the fused and of the folded one."""

from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore import kernels, models
from kdcore.catalog.architectures import architecture
from kdcore.kernels.convolution import Packed
from kdcore.models import layers
from kdcore.models.layers import InTurn, conv_norm, fold, norm_act, run_in_turn, with_shortcut
from kdcore.models.taps import Taps

FAMILIES = ["resnet8", "resnet8_option_a", "wrn_16_1", "vgg8", "mobilenetv2_x0_5", "shufflenetv1", "shufflenetv2"]
FAMILIES += ["convnet4", "torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/densenet121"]
QUICK = ["resnet8", "wrn_16_1", "mobilenetv2_x0_5", "shufflenetv1", "shufflenetv2", "torchvision/mobilenet_v3_small"]

needs_fold = pytest.mark.skipif(not layers.can_fold(False), reason="oneDNN's fused convolutions do not work here")
needs_bf16 = pytest.mark.skipif(not layers.can_fold(True), reason="oneDNN has no bfloat16 convolutions here")


def images(count: int, side: int = 32) -> Tensor:
    maps = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return maps.contiguous(memory_format=torch.channels_last)


def trained(name: str) -> nn.Module:
    """A network in eval mode whose batch norms have statistics, as after a training."""
    torch.manual_seed(0)
    network = models.build(name, 5, 3).to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0)):
                nn.init.uniform_(value, low, high)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return network.eval().requires_grad_(False)


def folded(name: str, bf16: bool) -> nn.Module:
    network = trained(name)
    fold(network, bf16)
    return network


def answers(network: nn.Module, maps: Tensor, bf16: bool = False) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return network(maps).float()


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_fold
@pytest.mark.parametrize("name", FAMILIES)
def test_fold_in_float32_gives_the_eager_logits(name: str):
    assert error(answers(folded(name, False), images(2)), answers(trained(name), images(2))) < 1e-4


@needs_bf16
@pytest.mark.parametrize("name", QUICK)
def test_fold_in_bfloat16_is_as_near_to_float32_as_autocast(name: str):
    expected = answers(trained(name), images(2))
    by_autocast = error(answers(trained(name), images(2), True), expected)
    assert error(answers(folded(name, True), images(2), True), expected) < max(2 * by_autocast, 0.02)


@needs_bf16
@pytest.mark.usefixtures("own_convolutions")
@pytest.mark.parametrize(
    ("name", "bf16", "count"),
    [
        *(("resnet8", True, 7), ("wrn_16_1", True, 12), ("torchvision/resnet18", True, 8)),
        *(("resnet8", False, 4), ("wrn_16_1", False, 10), ("torchvision/resnet18", False, 13)),
    ],
)
def test_fold_computes_3x3_convolutions_by_our_own_kernel(
    name: str, bf16: bool, count: int, monkeypatch: pytest.MonkeyPatch
):
    """In bfloat16 all whose maps are wide enough; the stem of a wide ResNet, which no norm follows, is called as a
    module. In float32 those without a stride, but for the stem."""
    run, shapes = Packed.__call__, []
    monkeypatch.setattr(Packed, "__call__", lambda *args: shapes.append(args[1].shape) or run(*args))
    with kernels.paused():
        expected = answers(trained(name), images(2))
        by_autocast = error(answers(trained(name), images(2), True), expected)
    allowed = max(2 * by_autocast, 0.02) if bf16 else 1e-5
    assert error(answers(folded(name, bf16), images(2), bf16), expected) < allowed
    assert len(shapes) == count
    with kernels.paused():
        answers(folded(name, bf16), images(2), bf16)
    assert len(shapes) == count


@needs_bf16
@pytest.mark.usefixtures("own_convolutions")
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.Hardswish()])
def test_fold_every_activation_after_our_own_convolution(activation: nn.Module | None):
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16).eval()
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
    maps, shortcut = torch.randn(2, 16, 5, 5), 3 * torch.randn(2, 16, 5, 5)
    with torch.no_grad():
        expected = [conv_norm(layer, norm, maps, activation, one) for one in (None, shortcut)]
        fold(layer, True)
        found = [conv_norm(layer, norm, maps, activation, one) for one in (None, shortcut)]
    assert layer.folded.by_layers[norm, activation].own is not None
    assert all(error(*pair) < 0.02 for pair in zip(found, expected, strict=True))


@needs_fold
@pytest.mark.parametrize("name", ["resnet8", "torchvision/resnet18"])
def test_fold_leaves_no_separate_batch_norm(name: str, monkeypatch: pytest.MonkeyPatch):
    network = folded(name, False)
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *_: pytest.fail("a batch norm ran"))
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("a convolution ran by itself"))
    assert answers(network, images(1)).isfinite().all()


@needs_fold
def test_fold_the_networks_state_is_that_of_its_layers():
    network, before = folded("resnet8", False), trained("resnet8").state_dict()
    answers(network, images(1))
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(answers(deepcopy(network), images(1)), answers(network, images(1)))


@needs_fold
def test_fold_a_gradient_takes_the_eager_form():
    maps = images(2).requires_grad_()
    by_fold, by_eager = folded("resnet8", False)(maps), trained("resnet8")(maps)
    assert by_fold.requires_grad and torch.equal(by_fold, by_eager)


@needs_fold
def test_fold_train_mode_takes_the_eager_form():
    network = folded("resnet8", False).train()
    assert torch.equal(answers(network, images(2)), answers(trained("resnet8").train(), images(2)))


@needs_fold
def test_fold_layers_without_a_folded_form_stay_eager():
    """A padding that reflects, and a batch norm without running statistics."""
    reflected = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    without = nn.BatchNorm2d(4, track_running_stats=False)
    for layer, norm in ((reflected, nn.BatchNorm2d(4)), (nn.Conv2d(3, 4, 3, padding="same"), without)):
        network = InTurn(layer, norm, nn.ReLU()).eval().requires_grad_(False)
        expected = answers(network, images(2, 6))
        fold(network, False)
        assert torch.equal(answers(network, images(2, 6)), expected)


@needs_fold
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.SiLU()])
def test_fold_every_activation_with_and_without_a_shortcut(groups: int, activation: nn.Module | None):
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(4, 4, 3, padding=1, groups=groups), nn.BatchNorm2d(4).eval()
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
    maps, shortcut = torch.randn(2, 4, 5, 5), 3 * torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = [conv_norm(layer, norm, maps, activation, one) for one in (None, shortcut)]
        fold(layer, False)
        found = [conv_norm(layer, norm, maps, activation, one) for one in (None, shortcut)]
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, expected, strict=True))


@needs_bf16
@pytest.mark.usefixtures("own_convolutions")
def test_fold_a_row_has_the_same_bits_by_our_own_convolutions_too(one_thread: None):
    test_fold_a_row_has_the_same_bits_in_any_place_beside_any_others("resnet8", one_thread)


@needs_bf16
@pytest.mark.parametrize("name", ["resnet8", "torchvision/mobilenet_v3_small"])
def test_fold_a_row_has_the_same_bits_in_any_place_beside_any_others(name: str, one_thread: None):
    """Also at its taps, before a ReLU too, and with two threads; of all networks: proofs/test_folded_rows.py."""
    network, facts = folded(name, True), architecture(name)
    rows, others = images(8, 16), torch.tensor([3, 3, 0, 7, 3, 1, 1, 3])
    for paths in ([*facts.taps, facts.embedding], facts.preactivations):
        taps = Taps(network, paths)
        torch.set_num_threads(1)
        first = [answers(network, rows, True), *taps.read().values()]
        torch.set_num_threads(2)
        second = [answers(network, rows[others], True), *taps.read().values()]
        taps.close()
        assert all(torch.equal(one[others], other) for one, other in zip(first, second, strict=True))


def test_can_fold_is_false_without_the_private_operators(monkeypatch: pytest.MonkeyPatch):
    layers.can_fold.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    assert not layers.can_fold(False)
    layers.can_fold.cache_clear()


def test_can_fold_is_false_where_the_operator_computes_something_else(monkeypatch: pytest.MonkeyPatch):
    layers.can_fold.cache_clear()
    monkeypatch.setattr(layers._Folded, "__call__", lambda _self, maps, *_: maps)
    assert not layers.can_fold(False)
    layers.can_fold.cache_clear()


@needs_fold
@pytest.mark.parametrize(
    "name", ["resnet8", "mobilenetv2_x0_5", "torchvision/mobilenet_v3_small", "torchvision/mnasnet0_5"]
)
def test_every_module_that_is_tapped_sees_what_it_sees_in_the_eager_form(name: str):
    """In train mode it is bit-equal; hooks keep what they get, so only what is tapped is eager."""
    convolutions = [path for path, module in trained(name).named_modules() if isinstance(module, nn.Conv2d)]
    paths = [*convolutions[:3], *convolutions[-2:]]
    network, eager = folded(name, False), trained(name)
    taps, plain = Taps(network, paths), {}
    for path in paths:
        eager.get_submodule(path).register_forward_hook(lambda *args, path=path: plain.update({path: args[2]}))
    answers(network, images(1)), answers(eager, images(1))
    assert all(error(seen, plain[path]) < 1e-4 for path, seen in taps.read().items())


def test_with_shortcut_a_tap_on_the_sequence_sees_it_without_the_shortcut():
    sequence, maps = InTurn(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval(), torch.ones(1, 2, 3, 3)
    alone = sequence(maps)
    assert torch.equal(with_shortcut(sequence, maps, maps), alone + maps)
    seen = []
    sequence.register_forward_hook(lambda *args: seen.append(args[2]))
    assert torch.equal(with_shortcut(nn.Sequential(sequence), maps, maps), alone + maps)
    assert torch.equal(seen[0], alone)


def test_run_in_turn_is_the_sequence():
    torch.manual_seed(0)
    sequence = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    maps = torch.randn(2, 2, 4, 4)
    assert torch.equal(run_in_turn(sequence, maps), sequence(maps))
    assert torch.equal(run_in_turn(sequence, maps, maps.mean(1, True)), sequence(maps) + maps.mean(1, True))
    sequence.append(nn.ReLU())
    assert torch.equal(run_in_turn(sequence, maps, maps.mean(1, True)), sequence(maps) + maps.mean(1, True))


class Kernel:
    """In the place of the compiled kernel: it computes with PyTorch, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[bool, bool]] = []

    def __call__(self, norm: nn.BatchNorm2d, maps: Tensor, shortcut: Tensor | None = None, relu: bool = True) -> Tensor:
        self.calls.append((shortcut is not None, relu))
        maps = norm.forward(maps)
        maps = maps if shortcut is None else maps + shortcut
        return F.relu(maps) if relu else maps


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    stands_in = Kernel()
    monkeypatch.setattr(kernels, "norm_relu", stands_in)
    return stands_in


@pytest.mark.parametrize("name", [*QUICK, "vgg8", "torchvision/resnet18", "torchvision/densenet121"])
def test_norm_act_gives_every_batch_norm_of_a_learner_to_the_kernel(name: str, kernel: Kernel):
    network = trained(name).train()
    found = network(images(2))
    assert len(kernel.calls) == sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    kernel.calls.clear()
    network.eval()(images(2))
    assert kernel.calls == [] and found.isfinite().all()


def test_norm_act_a_resnets_blocks_add_within_the_kernel(kernel: Kernel):
    """Stem; two in each of three blocks, and the shortcuts of two of them."""
    trained("resnet8").train()(images(2))
    assert sorted(kernel.calls) == [(False, False)] * 2 + [(False, True)] * 4 + [(True, True)] * 3


def test_norm_act_a_tapped_place_is_eager(kernel: Kernel):
    network = trained("resnet8").train()
    taps = Taps(network, ["layer1.0.relu@in", "layer2.0.bn1"])
    network(images(2))
    seen = taps.read()
    assert sorted(kernel.calls) == [(False, False)] * 2 + [(False, True)] * 3 + [(True, True)] * 2
    assert all((maps < 0).any() for maps in seen.values()), "both are maps before a ReLU"


def test_norm_act_another_activation_follows_the_kernel(kernel: Kernel):
    norm, maps = nn.BatchNorm2d(2), torch.randn(4, 2, 3, 3)
    assert torch.equal(norm_act(norm, maps, nn.Hardswish()), F.hardswish(nn.BatchNorm2d(2)(maps)))
    assert kernel.calls == [(False, False)]


@needs_bf16
@pytest.mark.usefixtures("own_convolutions")
def test_learners_take_our_own_convolutions_and_have_their_gradients():
    found: list[list[Tensor]] = []
    for bf16, paused in ((True, False), (True, True), (False, True)):
        network = trained("resnet8").requires_grad_().eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), kernels.paused() if paused else nullcontext():
            logits = network(images(4))
        logits.float().square().sum().backward()
        found.append([logits.detach().float(), *(one.grad for one in network.parameters())])
    assert not all(map(torch.equal, found[0], found[1]))
    for ours, by_autocast, right in zip(*found, strict=True):
        assert error(ours, right) < max(1.5 * error(by_autocast, right), 0.02)


@pytest.mark.parametrize(("size", "stride"), [(5, 1), (3, 2), (5, 2)])
def test_depthwise_gradients_are_those_of_autocast_but_rounded_less(
    size: int, stride: int, monkeypatch: pytest.MonkeyPatch, kernel: Kernel
):
    torch.manual_seed(0)
    layer, norm, maps = nn.Conv2d(8, 8, size, stride, size // 2, groups=8), nn.BatchNorm2d(8).eval(), images(4, 7)
    maps = torch.randn(4, 8, 7, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    found: dict[bool, list[Tensor]] = {}
    for enabled in (False, True):
        monkeypatch.setattr(kernels, "enabled", lambda enabled=enabled: enabled)
        layer.zero_grad()
        inputs = maps.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = conv_norm(layer, norm, inputs)
        assert ("Depthwise" in str(out.grad_fn.next_functions[0][0])) == enabled
        out.float().square().sum().backward()
        found[enabled] = [out.detach(), inputs.grad.float(), layer.weight.grad, layer.bias.grad]
    assert torch.equal(found[True][0], found[False][0])
    assert all(error(ours, theirs) < 0.02 for ours, theirs in zip(found[True][1:], found[False][1:], strict=True))
    exact = layer.weight.detach().bfloat16().double().requires_grad_()
    out = F.conv2d(maps.double(), exact, layer.bias.double(), stride, size // 2, 1, 8)
    assert layer.weight.grad.dtype == torch.float32 and out.shape == found[True][0].shape
