import pytest
import torch
from torch import nn

from kdcore.average import Average


def test_weights_follow_and_counters_are_copied():
    """Decay 0.9: 0.9 · 1 + 0.1 · 3 = 1.2."""
    net = nn.BatchNorm1d(1)
    average = Average(net, 0.9)
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.running_mean.fill_(10.0)
        net.num_batches_tracked.fill_(7)
    average.update(net)
    assert average.state["weight"].item() == pytest.approx(1.2)
    assert average.state["running_mean"].item() == pytest.approx(1.0)
    assert average.state["num_batches_tracked"].item() == 7
