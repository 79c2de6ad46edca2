import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from base.errors import SpecInvalid
from kdcore.models.taps import Taps


def network(inplace: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace), nn.Flatten(), nn.Sequential(nn.Linear(8, 3)))


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 4, 4)


def test_taps_output_and_input_of_a_module_are_what_flows_there():
    net = network()
    taps = Taps(net, ["1", "3.0@in", "1"])
    inputs = images()
    net(inputs)
    seen = taps.read()
    assert torch.equal(seen["1"], net[1](net[0](inputs)))
    assert torch.equal(seen["3.0@in"], seen["1"].flatten(1))


def test_taps_the_gradient_flows_through_a_tap():
    net = network()
    taps = Taps(net, ["1"])
    net(images())
    taps.read()["1"].sum().backward()
    assert net[0].weight.grad is not None and net[3][0].weight.grad is None


def test_taps_an_input_by_name_is_an_input():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(input=images)

    taps = Taps(net := Outer(), ["inner@in"])
    net(inputs := torch.randn(4, 3))
    assert taps.read()["inner@in"] is inputs


class Gives(nn.Module):
    """A network of one layer that returns the given tensor."""

    def __init__(self, activation: object, **attributes: int) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.activation = activation
        vars(self).update(attributes)

    def forward(self, images: Tensor) -> None:
        self.layer(self.activation)


def seen_of(path: str, activation: object, **attributes: int) -> Tensor:
    taps = Taps(net := Gives(activation, **attributes), [path])
    net(torch.zeros(1))
    return taps.read()[path]


def test_taps_channels_that_come_last_are_brought_to_the_front():
    maps = torch.randn(2, 3, 5, 7)
    assert torch.equal(seen_of("layer@nhwc", maps.permute(0, 2, 3, 1)), maps)


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_taps_tokens_of_patches_are_laid_out_row_by_row(prefix: int):
    """Patch (i, j) of a 3 x 3 image is token 3 i + j after the class token and registers."""
    patches = torch.randn(2, 3, 3, 6)
    tokens = torch.cat([torch.full((2, prefix, 6), torch.nan), patches.flatten(1, 2)], dim=1)
    assert torch.equal(seen_of("layer@tokens", tokens), patches.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("tokens", "side"), [(9, 2), (4, 2), (14, 3)])
def test_taps_a_network_that_says_how_many_tokens_stand_before_the_patches_is_believed(tokens: int, side: int):
    """A class token and four registers before 2 x 2 and 3 x 3 patches; and a layer before they were added."""
    assert seen_of("layer@tokens", torch.zeros(1, tokens, 6), num_prefix_tokens=5).shape == (1, 6, side, side)


def test_taps_patches_of_no_square_are_refused_where_that_can_be_known():
    with pytest.raises(SpecInvalid, match="141 tokens, 1 of them before the patches"):
        seen_of("layer@tokens", torch.zeros(1, 141, 6), num_prefix_tokens=1)


@pytest.mark.parametrize(
    ("path", "activation", "reason"),
    [
        ("layer@nhwc", torch.zeros(2, 49, 8), "gives 2 x 49 x 8, not N x H x W x C"),
        ("layer@tokens", torch.zeros(2, 8, 7, 7), "gives 2 x 8 x 7 x 7, not N x L x D"),
        ("layer", (torch.zeros(1), torch.zeros(1)), "gives a tuple, not a tensor"),
        ("layer@in", None, "gives a NoneType, not a tensor"),
    ],
)
def test_taps_refuses_an_activation_of_another_shape(path: str, activation: object, reason: str):
    with pytest.raises(SpecInvalid, match=reason):
        seen_of(path, activation)


def test_taps_a_wrong_path_names_what_is_near():
    with pytest.raises(SpecInvalid, match="no such module") as caught:
        Taps(nn.ModuleDict({"layer1": nn.ReLU(), "layer2": nn.ReLU()}), ["layer3"])
    assert "layer1" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("layer3.9", "layer3.8, layer3.7"),
        ("layer3.8.con", "layer3.8.conv"),
        ("layer3.8.conv.weight", "layer3.8.conv holds no modules"),
        ("layer3.", "layer3.8"),
        ("bn", "layer3.8.bn"),
        ("", "layer3"),
        ("xyz@in", "layer3"),
    ],
)
def test_taps_a_wrong_path_names_the_children_of_what_exists(path: str, near: str):
    block = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "bn": nn.BatchNorm2d(1)})
    with pytest.raises(SpecInvalid, match="no such module") as caught:
        Taps(nn.ModuleDict({"layer3": nn.ModuleList([*(nn.ReLU() for _ in range(8)), block])}), [path])
    assert near in caught.value.hint


def test_taps_a_network_without_parts_says_so():
    with pytest.raises(SpecInvalid) as caught:
        Taps(nn.Linear(2, 2), ["fc"])
    assert caught.value.hint == "the network holds no modules"


def test_taps_a_wrong_ending_names_the_right_ones():
    with pytest.raises(SpecInvalid, match="there is no @out") as caught:
        Taps(network(), ["1@out"])
    assert caught.value.hint == "@in, @nhwc, @tokens"


def test_taps_an_overwritten_activation_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True))
    taps = Taps(net, ["1"])
    net(torch.randn(4, 3))
    with pytest.raises(SpecInvalid, match="overwrote"):
        taps.read()


def test_taps_a_module_that_runs_twice_is_refused():
    relu = nn.ReLU()
    taps = Taps(net := nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu), ["1"])
    with pytest.raises(SpecInvalid, match="twice"):
        net(torch.randn(4, 3))
    taps.close()


def test_taps_a_module_that_did_not_run_is_named():
    taps = Taps(network(), ["1"])
    with pytest.raises(SpecInvalid, match="did not run"):
        taps.read()


def test_taps_a_pass_that_failed_leaves_nothing_for_the_next():
    net = network()
    taps = Taps(net, ["0", "3"])
    with pytest.raises(RuntimeError):
        net(torch.randn(1, 1, 9, 9))
    with pytest.raises(SpecInvalid, match="'3': the module did not run"):
        taps.read()
    with pytest.raises(RuntimeError):
        net(torch.randn(1, 1, 9, 9))
    net(images())
    assert len(taps.read()["0"]) == 5


def test_taps_reading_forgets_and_closing_leaves_no_hook():
    net = network()
    taps = Taps(net, ["1"])
    net(images())
    activation = weakref.ref(taps.read()["1"])
    gc.collect()
    assert activation() is None
    taps.close()
    net(images())
    assert not net[1]._forward_hooks and not net._forward_pre_hooks
    with pytest.raises(SpecInvalid):
        taps.read()


def test_no_taps_are_no_hooks():
    Taps(net := network(), [])
    assert not net._forward_pre_hooks


def test_taps_a_wrong_path_leaves_no_hooks():
    net = network()
    with pytest.raises(SpecInvalid):
        Taps(net, ["1", "9"])
    assert not net._forward_pre_hooks and not net[1]._forward_hooks


class Checkpointed(nn.Module):
    """Its body runs again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2)
        self.reentrant = reentrant
        self.passes = 0
        self.body.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    def forward(self, images: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, self.stem(images), use_reentrant=self.reentrant))


@pytest.mark.parametrize("reads", [True, False])
def test_taps_a_module_that_runs_again_in_the_backward_pass_is_tapped_once(reads: bool):
    net = Checkpointed(reentrant=False)
    taps = Taps(net, ["body", "body.0@in"])
    for _ in range(2):
        net(torch.randn(4, 3)).square().sum().backward(retain_graph=not reads)
        if reads:
            taps.read()
    assert net.passes == 4
    if reads:
        assert not taps._activations


def test_taps_a_whole_network_that_runs_again_keeps_what_its_first_run_gave():
    net = network()
    taps = Taps(net, ["1"])
    checkpoint(net, inputs := images(), use_reentrant=False).sum().backward()
    assert torch.equal(taps.read()["1"], net[1](net[0](inputs)))


def test_taps_the_gradient_through_a_checkpointed_tap_is_the_plain_one():
    net = Checkpointed(reentrant=False)
    inputs = torch.randn(4, 3)
    taps = Taps(net, ["body"])
    (net(inputs).sum() + taps.read()["body"].square().sum()).backward()
    through_checkpoint = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    maps = net.body(net.stem(inputs))
    (net.head(maps).sum() + maps.square().sum()).backward()
    for parameter, grad in zip(net.parameters(), through_checkpoint, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_taps_a_module_that_runs_without_gradients_could_teach_nothing():
    """A reentrant checkpoint's first run is cut off from the graph. A frozen teacher's pass has no gradients at all."""
    net = Checkpointed(reentrant=True)
    taps = Taps(net, ["body"])
    with pytest.raises(SpecInvalid, match="without gradients") as caught:
        net(torch.randn(4, 3))
    assert "use_reentrant=False" in caught.value.hint
    with torch.no_grad():
        net(torch.randn(4, 3))
    assert taps.read()["body"].shape == (4, 3)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # The compiler looks, and would hide this itself.
@pytest.mark.usefixtures("fresh_compiler")
class TestCompiled:
    def test_hooks_fire_on_every_run_with_what_flows_there(self):
        net = network()
        taps = Taps(compiled := torch.compile(net, backend="eager"), ["1", "3.0@in"])
        for count in (5, 5, 2):
            logits = compiled(inputs := images(count))
            seen = taps.read()
            torch.testing.assert_close(seen["1"], net[1](net[0](inputs)))
            torch.testing.assert_close(net[3](seen["3.0@in"]), logits)
            seen["1"].sum().backward()
        assert net[0].weight.grad is not None

    def test_taps_that_were_there_before_are_seen_too(self):
        net = network()
        taps = Taps(net, ["1"])
        torch.compile(net, backend="eager")(images())
        assert taps.read()["1"].shape == (5, 2, 2, 2)

    def test_taps_that_come_too_late_are_refused(self):
        net = network()
        compiled = torch.compile(net, backend="eager")
        compiled(images())
        taps = Taps(compiled, ["1"])
        compiled(images())
        with pytest.raises(SpecInvalid, match="did not run") as caught:
            taps.read()
        assert "torch.compile" in caught.value.hint

    def test_an_overwritten_activation_is_refused(self):
        taps = Taps(compiled := torch.compile(network(inplace=True), backend="aot_eager"), ["0"])
        compiled(images())
        with pytest.raises(SpecInvalid, match="overwrote"):
            taps.read()

    def test_a_stage_that_is_compiled_by_itself_has_its_own_path(self):
        net = network()
        net[3] = torch.compile(net[3], backend="eager")
        taps = Taps(net, ["3", "3.0@in"])
        logits = net(images())
        torch.testing.assert_close(taps.read()["3"], logits)


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_taps_paths_are_those_inside_of_distributed_data_parallel():
    net = network()
    taps = Taps(parallel := nn.parallel.DistributedDataParallel(net), ["1"])
    parallel(inputs := images()).sum().backward()
    torch.testing.assert_close(taps.read()["1"], net[1](net[0](inputs)))


def test_taps_paths_are_those_inside_of_data_parallel():
    taps = Taps(parallel := nn.DataParallel(network()), ["3.0"])
    logits = parallel(images())
    assert torch.equal(taps.read()["3.0"], logits)


def test_taps_a_network_split_over_devices_has_no_one_activation():
    parallel = nn.DataParallel(network())
    parallel.device_ids = [0, 1]
    with pytest.raises(SpecInvalid, match="split over several devices"):
        Taps(parallel, ["1"])
