import math

import pytest
import torch

from kdcore.measure import calibration

# Two classes: a difference d of the logits is a probability of 1 / (1 + e^-d).
SURE, LIKELY = math.log(9), math.log(3)


def logits(*differences: float) -> torch.Tensor:
    return torch.tensor([[difference, 0.0] for difference in differences])


def test_reliability_each_image_is_in_the_bin_of_its_confidence():
    right = torch.tensor([True, True, False, True])
    bins = calibration.reliability(torch.tensor([0.9, 0.9, 0.9, 0.7], dtype=torch.float64), right)
    assert len(bins) == calibration.BINS and [one["images"] for one in bins if one["images"]] == [1, 3]
    upper, lower = bins[13], bins[10]  # 0.9 is in (13/15, 14/15], 0.7 in (10/15, 11/15].
    assert upper["images"] == 3 and upper["confidence"] == pytest.approx(0.9)
    assert upper["accuracy"] == pytest.approx(2 / 3) and lower["accuracy"] == 1
    assert bins[0] == {"images": 0, "confidence": None, "accuracy": None}


def test_reliability_the_last_bin_has_certainty_and_the_first_one_nothing_below_it():
    bins = calibration.reliability(torch.tensor([1.0, 0.0, 1 / 15], dtype=torch.float64), torch.ones(3).bool())
    assert [one["images"] for one in bins] == [2, *[0] * 13, 1]


def test_ece_is_the_mean_distance_weighted_by_images():
    right = torch.tensor([True, True, False, True])
    bins = calibration.reliability(torch.tensor([0.9, 0.9, 0.9, 0.7], dtype=torch.float64), right)
    assert calibration.ece(bins) == pytest.approx((3 * (0.9 - 2 / 3) + 1 * (1 - 0.7)) / 4)


def test_fitted_temperature_is_that_which_gives_the_share_of_right_answers():
    """All have p = 0.9 at T = 1, and three of four are right: p must become 0.75, so T = log 9 / log 3."""
    labels = torch.tensor([0, 0, 0, 1])
    found = calibration.fitted_temperature(logits(*[SURE] * 4).double(), labels)
    assert found == pytest.approx(SURE / LIKELY, rel=1e-3)
    assert calibration.fitted_temperature(logits(*[LIKELY] * 4).double(), labels) == pytest.approx(1, rel=1e-3)


def test_fitted_temperature_has_the_smallest_loss_of_a_fine_grid():
    generator = torch.Generator().manual_seed(0)
    logits_nK = 4 * torch.randn(500, 7, generator=generator)
    labels = torch.where(torch.rand(500, generator=generator) < 0.6, logits_nK.argmax(1), torch.randint(7, (500,)))
    found = calibration.fitted_temperature(logits_nK, labels)

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits_nK.double() / temperature, labels).item()

    grid = [math.exp(0.01 * step) for step in range(-250, 250)]
    assert loss(found) <= min(map(loss, grid)) + 1e-9


@pytest.mark.parametrize(
    ("differences", "labels"),
    [([5, 5, 5], [0, 0, 0]), ([500, 500, 500], [0, 0, 0]), ([0, 0, 0], [0, 1, 0]), ([5, 5, 5], [1, 1, 1])],
    ids=["all are right", "all are right, and certain", "it knows nothing", "all are wrong"],
)
def test_fitted_temperature_is_none_where_the_loss_has_no_minimum(differences, labels):
    assert calibration.fitted_temperature(logits(*differences), torch.tensor(labels)) is None


def test_calibration_after_the_temperature_the_answers_are_the_same_and_the_error_is_smaller():
    labels = torch.tensor([0, 0, 0, 1])
    found = calibration.calibration(logits(*[SURE] * 4), labels, SURE / LIKELY)
    assert found["ece"] == pytest.approx(0.9 - 0.75) and found["ece_after"] == pytest.approx(0, abs=1e-6)
    assert sum(one["images"] for one in found["reliability_after"]) == 4
    without = calibration.calibration(logits(*[SURE] * 4), labels, None)
    assert without["ece_after"] is None and without["reliability_after"] is None
