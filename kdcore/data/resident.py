"""Decoded images as the training loop wants them: bytes in one block, in memory or mapped from a file."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcore.catalog.facts import DatasetFacts


@dataclass(frozen=True)
class Images:
    """One split: pixels uint8 N × C × H × W, labels int64 N. A batch is a gather of rows."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Images":
        """The split on another device; a mapped one is read whole by this."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Images":
        """A copy of some rows. Views are drawn by row, so what is trained on should stay whole and be indexed."""
        index = index.to(self.pixels.device)
        return Images(self.pixels.index_select(0, index), self.labels.index_select(0, index))


@dataclass(frozen=True)
class Data:
    """A data set ready to train on, and what is known about it."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    facts: DatasetFacts

    def to(self, device: torch.device | str) -> "Data":
        return Data(self.train.to(device), self.test.to(device), self.class_names, self.facts)
