import numpy as np
import pytest

from base.errors import DatasetUnreadable
from kdcore.data.source import Sums, carve, require_all_classes


def test_mean_and_std_worked_out_by_hand():
    """One channel of 0, 255, 255, 0: mean ½, deviation ½. The other is even: one grey level stands for no deviation."""
    sums = Sums(2)
    sums.add(np.array([[[[0, 255]], [[51, 51]]]], dtype=np.uint8))
    sums.add(np.array([[[[255, 0]], [[51, 51]]]], dtype=np.uint8))
    mean, std = sums.mean_and_std()
    assert mean == pytest.approx([0.5, 0.2])
    assert std == pytest.approx([0.5, 1 / 255], abs=1e-6)


def test_sums_are_exact_where_floats_are_not():
    pixels = np.full((500, 1, 100, 100), 255, dtype=np.uint8)
    pixels[0, 0, 0, 0] = 254
    sums = Sums(1)
    sums.add(pixels)
    assert sums._sum[0] == 500 * 10_000 * 255 - 1


def test_a_tenth_is_carved():
    aside = carve(np.arange(200) % 4)
    assert aside.sum() == 20


def test_too_few_to_carve():
    with pytest.raises(DatasetUnreadable, match="3 images are too few"):
        carve(np.array([0, 1, 2]))


def test_labels_that_start_at_1_are_found_out():
    with pytest.raises(DatasetUnreadable, match="No training image has label 0"):
        require_all_classes(np.array([1, 2, 1]), ("0", "1", "2"))


def test_one_class_is_none():
    with pytest.raises(DatasetUnreadable, match="only one class, 'cat'"):
        require_all_classes(np.zeros(3, dtype=np.int64), ("cat",))
