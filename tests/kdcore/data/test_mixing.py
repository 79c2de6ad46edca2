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
    (mixed,), labels = mixing.mixup([pixels], torch.eye(2), states(2), share)
    assert mixed.flatten().tolist() == [175, 125]
    assert labels.tolist() == [[0.25, 0.75], [0.75, 0.25]]


def test_cutmix_covers_what_its_labels_say():
    pixels = torch.zeros(2, 1, 10, 12, dtype=torch.uint8)
    pixels[1] = 255
    for key in range(30):
        (mixed,), labels = mixing.cutmix([pixels], torch.eye(2), states(2, key), mixing.beta_quantiles(1.0))
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
    seen = [mixing.cutmix([pixels], torch.eye(2), states(2, key), shares)[1][0, 1].item() for key in range(40)]
    assert max(seen) == pytest.approx(covered)


def test_mixup_blends_every_size_by_the_same_share_with_the_same_partner():
    small = torch.tensor([100, 200, 40], dtype=torch.uint8).view(3, 1, 1, 1)
    both, _ = mixing.mixup([small, small.repeat(1, 1, 2, 2)], torch.eye(3), states(3), mixing.beta_quantiles(1.0))
    assert torch.equal(both[1], both[0].repeat(1, 1, 2, 2))


@pytest.mark.parametrize("side", [24, 12, 9])
def test_cutmix_covers_the_same_part_at_every_size(side):
    """The box is drawn in 12 places; at 24 it is twice as large, at 9 its edges are rounded to whole places."""
    pixels = [torch.zeros(2, 1, size, size, dtype=torch.uint8) for size in (12, side)]
    for one in pixels:
        one[1] = 255
    for key in range(20):
        (first, other), _ = mixing.cutmix(pixels, torch.eye(2), states(2, key), mixing.beta_quantiles(1.0))
        for axis in (0, 1):
            edges, scaled = ((x[0, 0] == 255).any(1 - axis).nonzero().flatten().tolist() for x in (first, other))
            if edges and scaled:
                begin, end = edges[0] * side / 12, (edges[-1] + 1) * side / 12
                assert abs(scaled[0] - begin) <= 0.5 and abs(scaled[-1] + 1 - end) <= 0.5
