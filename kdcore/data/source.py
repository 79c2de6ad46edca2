"""What a data set on disk looks like to the rest of the engine, whatever form it came in.

A source knows its labels before any image is decoded; its pixels come in pieces that say where they belong, in the
order in which the file holds them. So one pass over an archive fills a store, or only measures it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from base.errors import DatasetUnreadable
from kdcore.catalog.facts import DatasetFacts
from kdcore.data.stratified import Labels, set_aside

Split = Literal["train", "test"]
Pixels = npt.NDArray[np.uint8]
CARVED_FRACTION = 0.1
_CARVING_SEED = 0


class Piece(NamedTuple):
    """Some decoded images (uint8 n × C × H × W) and the rows of a split that they fill."""

    split: Split
    rows: npt.NDArray[np.int64]
    pixels: Pixels


@dataclass(frozen=True)
class Source:
    """A data set that was looked through but not decoded yet. Without labels it has no class names and no test rows."""

    kind: Literal["arrays", "folders", "named"]
    class_names: tuple[str, ...]
    channels: int
    height: int
    width: int
    labels: dict[Split, Labels]
    test_carved: bool
    pieces: Callable[[], Iterator[Piece]]

    def facts(self, mean: list[float], std: list[float], digest: str | None) -> DatasetFacts:
        return DatasetFacts(
            kind=self.kind,
            labelled=bool(self.class_names),
            num_classes=len(self.class_names),
            class_names=list(self.class_names),
            channels=self.channels,
            image_size=(self.height, self.width),
            train=len(self.labels["train"]),
            test=len(self.labels["test"]),
            test_carved=self.test_carved,
            mean=mean,
            std=std,
            digest=digest,
        )


class Sums:
    """Per-channel mean and standard deviation of pixels scaled to 0..1, from exact integer sums."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sum = np.zeros(channels, dtype=np.int64)
        self._squares = np.zeros(channels, dtype=np.int64)

    def add(self, pixels: Pixels) -> None:
        self._count += pixels.size // pixels.shape[1]
        self._sum += pixels.sum(axis=(0, 2, 3), dtype=np.int64)
        self._squares += np.square(pixels, dtype=np.uint16).sum(axis=(0, 2, 3), dtype=np.int64)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        mean = self._sum / self._count
        variance = self._squares / self._count - mean**2
        # A channel that never varies would make normalisation divide by zero: one grey level is the least we say.
        std = np.maximum(np.sqrt(np.maximum(variance, 0)), 1.0)
        return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]


def no_labels(images: int) -> dict[Split, Labels]:
    """What stands for the labels of images that have none: -1 for each, and a test split of nothing."""
    return {"train": np.full(images, -1, dtype=np.int64), "test": np.empty(0, dtype=np.int64)}


def carve(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which rows of a data set without a test split become its test split: a tenth, the same ones every time."""
    aside = set_aside(labels, CARVED_FRACTION, _CARVING_SEED)
    if not aside.any():
        raise DatasetUnreadable(
            f"There is no test split, and {len(labels)} images are too few to set some aside.",
            "Add a test split, or more images of each class.",
        )
    return aside


def require_all_classes(labels: Labels, class_names: tuple[str, ...]) -> None:
    """Every class needs a training image: a class without one is nearly always a numbering that starts at 1."""
    if len(class_names) < 2:
        raise DatasetUnreadable(f"There is only one class, {class_names[0]!r}.", "A classifier needs two or more.")
    absent = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if len(absent):
        raise DatasetUnreadable(
            f"No training image has label {absent[0]} (class {class_names[absent[0]]!r}).",
            "Labels run from 0 to the number of classes minus one, and each must occur in the training split.",
        )
