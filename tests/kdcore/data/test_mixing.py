import pytest
import torch

from kdcore.data import counter_rng, mixing


def states(n: int = 16, key: int = 0) -> torch.Tensor:
    return counter_rng.streams(key, torch.arange(n))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 3.0, 100.0])
def test_beta_quantiles_quantiles_have_the_moments_of_beta(alpha):
    """Mean ½, variance 1 / (4·(2α + 1)), symmetric."""
    quantiles = mixing.beta_quantiles(alpha)
    assert quantiles.mean().item() == pytest.approx(0.5)
    assert quantiles.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.005)
    assert torch.allclose(quantiles + quantiles.flip(0), torch.ones(mixing.QUANTILES, dtype=torch.float64))
    assert (quantiles.diff() >= 0).all() and quantiles[0] >= 0


def test_beta_quantiles_alpha_1_is_even():
    expected = (torch.arange(mixing.QUANTILES, dtype=torch.float64) + 0.5) / mixing.QUANTILES
    assert torch.allclose(mixing.beta_quantiles(1.0), expected)


def test_partners_are_a_permutation_without_fixed_points():
    for key in range(20):
        partner, _ = mixing.partners(states(7, key))
        assert torch.equal(partner.sort().values, torch.arange(7))
        assert (partner != torch.arange(7)).all()


def test_mixup_by_hand():
    """λ = ¼ whatever is drawn: a quarter of one's own, three quarters of the partner's."""
    pixels = torch.tensor([100, 200], dtype=torch.uint8).view(2, 1, 1, 1)
    share = torch.full((mixing.QUANTILES,), 0.25, dtype=torch.float64)
    mixed, labels = mixing.mixup(pixels, torch.eye(2), states(2), share)
    assert mixed.flatten().tolist() == [175, 125]
    assert labels.tolist() == [[0.25, 0.75], [0.75, 0.25]]


def test_cutmix_covers_what_its_labels_say():
    pixels = torch.zeros(2, 1, 10, 12, dtype=torch.uint8)
    pixels[1] = 255
    for key in range(30):
        mixed, labels = mixing.cutmix(pixels, torch.eye(2), states(2, key), mixing.beta_quantiles(1.0))
        covered = (mixed[0] == 255).float().mean()
        assert labels[0, 1].item() == pytest.approx(covered.item(), abs=1e-6)
        assert torch.equal(mixed[0] == 255, mixed[1] == 0)
        rows, columns = (mixed[0, 0] == 255).any(1), (mixed[0, 0] == 255).any(0)
        assert rows.sum() * columns.sum() == (mixed[0] == 255).sum(), "one box"


@pytest.mark.parametrize(("share", "covered"), [(1.0, 0.0), (0.75, 0.25)])
def test_cutmix_box_before_clipping_has_area_1_minus_lambda(share, covered):
    """Side √¼ of 8 × 8: a box of 4 × 4 where the edge clips nothing; λ = 1 leaves the image as it is."""
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    pixels[1] = 255
    shares = torch.full((mixing.QUANTILES,), share, dtype=torch.float64)
    seen = [mixing.cutmix(pixels, torch.eye(2), states(2, key), shares)[1][0, 1].item() for key in range(40)]
    assert max(seen) == pytest.approx(covered)
