import numpy as np
import torch

from kdcore.catalog import DATASETS, named_facts
from kdcore.data.cache import decoded
from kdcore.data.digits import open_digits


def test_counts_and_facts_are_the_catalogs():
    digits = decoded(open_digits(None))
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.facts == named_facts("digits")
    assert digits.train.pixels.shape == (1437, 1, 8, 8) and digits.train.pixels.dtype == torch.uint8


def test_ink_is_stretched_to_bytes():
    """0 to 16 become 0 to 255: ink 8 is 127.5, rounded to even."""
    source = open_digits(None)
    values = {int(value) for piece in source.pieces() for value in np.unique(piece.pixels)}
    assert values == {round(ink * 255 / 16) for ink in range(17)}


def test_every_digit_is_held_out_in_proportion():
    digits = decoded(open_digits(None))
    train, test = digits.train.labels.bincount(), digits.test.labels.bincount()
    assert (test / (train + test) - 360 / 1797).abs().max() < 0.003


def test_the_split_never_changes():
    """Reports of different jobs are compared on it: the sum of the pixels held out stands for which ones they are."""
    assert int(decoded(open_digits(None)).test.pixels.sum()) == 1_784_618


def test_another_size():
    assert decoded(open_digits(16)).test.pixels.shape == (360, 1, 16, 16)
    assert DATASETS["digits"].source == "bundled"
