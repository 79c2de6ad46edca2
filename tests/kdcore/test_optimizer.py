import pytest
import torch
from torch import nn

from kdcore.optimizer import Average, learning_rate, optimizer_for, set_rate
from kdcore.spec import AdamW, Cosine, Multistep, Sgd


def test_learning_rate_multistep_falls_at_the_start_of_its_epoch():
    schedule = Multistep(milestones=(2, 3))
    rates = [learning_rate(1.0, schedule, step, steps_per_epoch=10, epochs=4) for step in (0, 19, 20, 29, 30, 39)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_learning_rate_cosine_starts_at_the_base_passes_the_middle_and_ends_low():
    rates = [learning_rate(2.0, Cosine(final_fraction=0.1), step, 10, 10) for step in (0, 50, 100)]
    assert rates == pytest.approx([2.0, 2.0 * 0.55, 0.2])


def test_learning_rate_warm_up_rises_in_a_line_and_hands_over_at_the_base():
    rates = [learning_rate(1.0, Cosine(warmup_epochs=1), step, steps_per_epoch=4, epochs=3) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_optimizer_for_sgd_takes_one_step_as_worked_out_by_hand():
    """w = 1, gradient 2, decay 0.5: w - 0.1 · (2 + 0.5 · 1) = 0.75."""
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = optimizer_for(Sgd(lr=0.1, weight_decay=0.5), [weight])
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert weight.item() == pytest.approx(0.75)


def test_optimizer_for_adamw_is_pytorchs():
    optimizer = optimizer_for(AdamW(lr=0.01, betas=(0.8, 0.9)), [nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_average_weights_follow_and_counters_are_copied():
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
    average.begin(net)
    assert average.state["weight"].item() == 3 and average.state["weight"] is not net.weight


@pytest.mark.parametrize("spec", [Sgd(), Sgd(momentum=0, weight_decay=0), Sgd(nesterov=True), AdamW()], ids=str)
def test_optimizer_for_a_captured_step_takes_the_same_steps_at_rates_from_a_tensor(spec):
    weights = []
    for captured in (False, True):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = optimizer_for(spec, [{"params": [weight]}], captured)
        (group,) = optimizer.param_groups
        rate = group["lr"]
        for step in range(3):
            set_rate(group, 0.1 / (step + 1))
            weight.grad = torch.tensor([0.5, 1.0]) * (step + 1)
            optimizer.step()
        assert (group["lr"] is rate) is captured
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)


def test_optimizer_for_a_captured_step_goes_on_from_its_state():
    weights = []
    for stopped in (False, True):
        weight = nn.Parameter(torch.tensor([1.0]))
        optimizer = optimizer_for(AdamW(), [weight], captured=True)
        for step in range(3):
            if stopped and step == 2:
                state, optimizer = optimizer.state_dict(), optimizer_for(AdamW(), [weight], captured=True)
                optimizer.load_state_dict(state)
            set_rate(optimizer.param_groups[0], 0.1)
            weight.grad = torch.tensor([0.5 + step])
            optimizer.step()
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
        weights.append(weight.detach())
    assert torch.equal(*weights)
