"""Decoded images as the training loop wants them: bytes in one block, in memory or mapped from a file."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcore.catalog.facts import DatasetFacts


class Stacked:
    """The rows of several stores, one store after the other, copied nowhere: what is mapped from a file stays mapped.

    It has what a batch asks of a tensor. On a GPU it becomes one: all rows go there anyway.
    """

    device = torch.device("cpu")

    def __init__(self, *stores: Tensor) -> None:
        self.stores = stores
        self.shape = torch.Size([sum(map(len, stores)), *stores[0].shape[1:]])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        rows = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        start = 0
        for store in self.stores:
            inside = (start <= index) & (index < start + len(store))
            rows[inside] = store.index_select(dim, index[inside] - start)
            start += len(store)
        return rows

    def __getitem__(self, rows: slice) -> Tensor:
        return self.index_select(0, torch.arange(*rows.indices(self.shape[0])))

    def to(self, device: torch.device | str) -> "Tensor | Stacked":
        if torch.device(device).type == "cpu":
            return self
        whole = torch.empty(self.shape, dtype=torch.uint8, device=device)
        start = 0
        for store in self.stores:
            whole[start : start + len(store)] = store
            start += len(store)
        return whole


@dataclass(frozen=True)
class Images:
    """One split: pixels uint8 N × C × H × W, labels int64 N (-1 where there is none). A batch is a gather of rows."""

    pixels: Tensor | Stacked
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


def joined(first: Images, second: Images) -> Images:
    """Both splits as one, the rows of the second after those of the first; neither is copied."""
    return Images(Stacked(*_stores(first), *_stores(second)), torch.cat([first.labels, second.labels]))


def _stores(images: Images) -> tuple[Tensor, ...]:
    return images.pixels.stores if isinstance(images.pixels, Stacked) else (images.pixels,)


@dataclass(frozen=True)
class Data:
    """A data set ready to train on, and what is known about it."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    facts: DatasetFacts

    def to(self, device: torch.device | str) -> "Data":
        return Data(self.train.to(device), self.test.to(device), self.class_names, self.facts)
