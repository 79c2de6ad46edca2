"""The bundled data set: 1,797 handwritten digits of 8 × 8 pixels, small enough to try everything in seconds.

See files/README.md for whose they are. 360 of them, each digit in proportion, are held out as the test split.
"""

import csv
import gzip
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from kdcore.data.arrays import resized
from kdcore.data.source import Piece, Source, Split
from kdcore.data.stratified import set_aside

TEST_IMAGES = 360
_SEED = 0
_SIDE = 8
_FULL_INK = 16


def open_digits(image_size: int | None) -> Source:
    packed = files("kdcore.data").joinpath("files/digits.csv.gz").read_bytes()
    table = np.array(list(csv.reader(gzip.decompress(packed).decode().splitlines())), dtype=np.int64)
    ink, digits = table[:, :-1].reshape(-1, 1, _SIDE, _SIDE), table[:, -1]
    pixels = resized(np.rint(ink * (255 / _FULL_INK)).astype(np.uint8), image_size)
    held_out = set_aside(digits, TEST_IMAGES / len(digits), _SEED)
    splits: dict[Split, npt.NDArray[np.bool_]] = {"train": ~held_out, "test": held_out}
    return Source(
        kind="named",
        class_names=tuple("0123456789"),
        channels=1,
        height=image_size or _SIDE,
        width=image_size or _SIDE,
        labels={split: digits[rows] for split, rows in splits.items()},
        test_carved=False,
        pieces=lambda: (Piece(split, np.arange(rows.sum()), pixels[rows]) for split, rows in splits.items()),
    )
