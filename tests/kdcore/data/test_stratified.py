import numpy as np
import pytest
import torch

from kdcore.data import Images, split
from kdcore.data.stratified import set_aside


def test_each_class_gives_its_share():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    aside = set_aside(labels, 0.1, seed=0)
    assert np.bincount(labels[aside]).tolist() == [10, 5, 1]


def test_what_is_left_over_goes_to_the_largest_remainders():
    """13, 13 and 14 at a tenth: 1.3 + 1.3 + 1.4 = 4 in all, and the fourth falls to the third class."""
    labels = np.repeat([0, 1, 2], [13, 13, 14])
    assert np.bincount(labels[set_aside(labels, 0.1, seed=0)]).tolist() == [1, 1, 2]


def test_the_same_part_every_time_and_another_by_seed():
    labels = np.arange(1000) % 7
    assert (set_aside(labels, 0.2, 5) == set_aside(labels, 0.2, 5)).all()
    assert (set_aside(labels, 0.2, 5) != set_aside(labels, 0.2, 6)).any()


def test_a_class_keeps_its_last_sample():
    assert set_aside(np.arange(5), 0.5, seed=0).sum() == 0
    assert np.bincount(np.array([0, 1, 1])[set_aside(np.array([0, 1, 1]), 0.9, seed=0)]).tolist() == [0, 1]


def test_a_small_fraction_of_few_samples_is_still_one():
    assert set_aside(np.zeros(4, dtype=np.int64), 0.05, seed=0).sum() == 1


def test_rows_without_a_label_stay_in_training_and_change_nothing_for_the_others():
    labels = torch.arange(90) % 3
    pixels = torch.zeros(120, 1, 2, 2, dtype=torch.uint8)
    train, validation = split(Images(pixels, torch.cat([labels, torch.full((30,), -1)])), 0.1, seed=1)
    assert torch.equal(validation, split(Images(pixels[:90], labels), 0.1, seed=1)[1])
    assert len(train) == 111 and set(range(90, 120)) <= set(train.tolist())


def test_nothing_is_set_aside_where_nothing_is_asked():
    assert not set_aside(np.zeros(100, dtype=np.int64), 0, seed=0).any()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_split_covers_every_row_once_in_rising_order(fraction):
    labels = torch.arange(90) % 3
    train, validation = split(Images(torch.zeros(90, 1, 2, 2, dtype=torch.uint8), labels), fraction, seed=1)
    assert len(validation) == round(90 * fraction)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(90))
    assert (train.diff() > 0).all() and train.dtype == torch.int64
