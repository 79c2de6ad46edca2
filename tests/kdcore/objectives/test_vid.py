import itertools
import math

import pytest
import torch

from kdcore.objectives.vid import Regressor, VariationalInformation, vid_loss
from kdcore.spec.methods import features
from tests.kdcore.objectives.lessons import SETTING, built, lesson, normal, parameters


def naive(mean: torch.Tensor, variance: torch.Tensor, teacher: torch.Tensor) -> float:
    total = 0.0
    for i, j, y, x in itertools.product(*map(range, mean.shape)):
        gap = mean[i, j, y, x].item() - teacher[i, j, y, x].item()
        total += (gap**2 / variance[j].item() + math.log(variance[j].item())) / 2
    return total / mean.numel()


def test_vid_loss_equals_a_value_computed_by_hand():
    """Gaps of 2 and 0 under variances 2 and 1: ½·(4/2 + ln 2) and ½·(0 + ln 1), then the mean of the two channels."""
    mean, teacher = torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1), torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1)
    value = vid_loss(mean, torch.tensor([2.0, 1.0]), teacher)
    assert value.item() == pytest.approx((2 + math.log(2)) / 4)


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 3, 3, 3), (5, 1, 1, 1)], ids=str)
def test_vid_loss_equals_the_sum_number_by_number(shape):
    mean, teacher, variance = normal(*shape), normal(*shape, seed=1), normal(shape[1], seed=2).exp()
    assert vid_loss(mean, variance, teacher).item() == pytest.approx(naive(mean, variance, teacher), abs=1e-9)


def test_vid_loss_is_the_likelihood_of_a_normal_distribution_except_for_a_constant():
    mean, variance, teacher = normal(2, 3, 4, 4), normal(3, seed=2).exp(), normal(2, 3, 4, 4, seed=1)
    likelihood = torch.distributions.Normal(mean, variance.sqrt()[:, None, None]).log_prob(teacher).mean()
    expected = -likelihood - math.log(2 * math.pi) / 2
    assert vid_loss(mean, variance, teacher).item() == pytest.approx(expected.item(), abs=1e-12)


def test_vid_loss_of_a_perfect_prediction_is_half_the_mean_log_variance():
    same = normal(2, 3, 4, 4)
    assert vid_loss(same, torch.full((3,), 0.1, dtype=torch.float64), same).item() == pytest.approx(math.log(0.1) / 2)


def test_regressor_starts_with_a_variance_of_five_and_has_a_lower_limit():
    regressor = Regressor(2, 3)
    _, variance = regressor(torch.zeros(1, 2, 1, 1))
    assert variance.tolist() == pytest.approx([5.0] * 3, rel=1e-6)
    torch.nn.init.constant_(regressor.unbounded, -1e4)
    _, variance = regressor(torch.zeros(1, 2, 1, 1))
    assert variance.tolist() == pytest.approx([1e-5] * 3)


def test_regressor_has_three_convolutions_without_bias_and_a_variance_for_each_channel():
    assert parameters(Regressor(3, 5)) == 3 * 5 + 5 * 5 + 5 * 5 + 5


def test_variational_information_sums_the_losses_of_its_taps():
    seen = lesson(
        {"early": normal(2, 3, 6, 6), "late": normal(2, 4, 3, 3)},
        {"early": normal(2, 5, 6, 6, seed=1), "late": normal(2, 6, 3, 3, seed=1)},
    )
    both, early, late = (
        built(VariationalInformation(features.Vid(taps=taps), SETTING), seen)
        for taps in (("early", "late"), ("early",), ("late",))
    )
    early.guesses[0], late.guesses[0] = both.guesses[0], both.guesses[1]
    assert both(seen).item() == pytest.approx((early(seen) + late(seen)).item())
