import pytest
import torch
from torch import nn

from kdcore.errors import SpecInvalid
from kdcore.taps import Taps


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def test_output_and_input_of_a_module_are_what_flows_there():
    net = network()
    taps = Taps(net, ["1", "3@in"])
    inputs = torch.randn(5, 1, 4, 4)
    net(inputs)
    seen = taps.read()
    assert torch.equal(seen["1"], net[1](net[0](inputs)))
    assert torch.equal(seen["3@in"], seen["1"].flatten(1))


def test_the_gradient_flows_through_a_tap():
    net = network()
    taps = Taps(net, ["1"])
    net(torch.randn(2, 1, 4, 4))
    taps.read()["1"].sum().backward()
    assert net[0].weight.grad is not None and net[3].weight.grad is None


def test_a_wrong_path_names_what_is_near():
    with pytest.raises(SpecInvalid, match="no such module") as caught:
        Taps(nn.ModuleDict({"layer1": nn.ReLU(), "layer2": nn.ReLU()}), ["layer3"])
    assert "layer1" in caught.value.hint


def test_an_overwritten_activation_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True))
    taps = Taps(net, ["1"])
    net(torch.randn(4, 3))
    with pytest.raises(SpecInvalid, match="overwrote"):
        taps.read()


def test_a_module_that_runs_twice_is_refused():
    relu = nn.ReLU()
    taps = Taps(net := nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu), ["1"])
    with pytest.raises(SpecInvalid, match="twice"):
        net(torch.randn(4, 3))
    taps.close()


def test_a_module_that_did_not_run_is_named():
    taps = Taps(network(), ["1"])
    with pytest.raises(SpecInvalid, match="did not run"):
        taps.read()


def test_reading_forgets_and_closing_leaves_no_hook():
    net = network()
    taps = Taps(net, ["1"])
    net(torch.randn(1, 1, 4, 4))
    taps.read()
    taps.close()
    net(torch.randn(1, 1, 4, 4))
    assert not net[1]._forward_hooks
    with pytest.raises(SpecInvalid):
        taps.read()
