"""Decoded images (bytes in one block, in memory or mapped from a file), and their division for a training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcore.catalog.facts import DatasetFacts
from kdcore.data import counter_rng
from kdcore.spec import Training, Unlabelled

if TYPE_CHECKING:
    from kdcore.data.streaming import Streamed

Labels = npt.NDArray[np.int64]


class Stacked:
    """The rows of several pixel tensors, one tensor after the other, without a copy: mapped files stay mapped.

    It has the methods of a tensor that a batch needs. On a GPU it becomes a tensor, because all rows are copied there
    anyway, unless a part of it is streamed.
    """

    def __init__(self, *stores: Tensor | Streamed) -> None:
        self.stores = stores
        self.device = stores[0].device
        self.shape = torch.Size([sum(map(len, stores)), *stores[0].shape[1:]])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        rows = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8, device=self.device)
        start = 0
        for store in self.stores:
            inside = (start <= index) & (index < start + len(store))
            rows[inside] = store.index_select(dim, index[inside] - start)
            start += len(store)
        return rows

    def __getitem__(self, rows: slice) -> Tensor:
        return self.index_select(0, torch.arange(*rows.indices(self.shape[0]), device=self.device))

    def expect(self, rows: Tensor) -> None:
        """See `Images.expect`."""
        start = 0
        for store in self.stores:
            if not isinstance(store, Tensor):
                store.expect(rows[(start <= rows) & (rows < start + len(store))] - start)
            start += len(store)

    def to(self, device: torch.device | str) -> Tensor | Stacked:
        if torch.device(device).type == "cpu":
            return self
        if not all(isinstance(store, Tensor) for store in self.stores):
            return Stacked(*(store.to(device) for store in self.stores))
        whole = torch.empty(self.shape, dtype=torch.uint8, device=device)
        start = 0
        for store in self.stores:
            whole[start : start + len(store)] = store[:]
            start += len(store)
        return whole


@dataclass(frozen=True)
class Images:
    """One split: pixels uint8 N × C × H × W, labels int64 N (-1 without a label). A batch is a gather of rows."""

    pixels: Tensor | Stacked | Streamed
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Return the split on another device. A mapped split is then read completely."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> Images:
        """Return a copy of some rows. The images of a training are indexed instead: views depend on the row number."""
        index = index.to(self.pixels.device)
        return Images(self.pixels.index_select(0, index), self.labels.index_select(0, index))

    def part(self, index: Tensor) -> Images:
        """Return some rows as a split of its own: a copy, or rows of a file that are decoded when they are needed."""
        if isinstance(self.pixels, Tensor | Stacked):
            return self.take(index)
        return Images(self.pixels.part(index), self.labels.index_select(0, index.to(self.labels.device)))

    def expect(self, rows: Tensor) -> None:
        """Say which rows are taken next, in this order: those of a file are decoded ahead."""
        if not isinstance(self.pixels, Tensor):
            self.pixels.expect(rows)

    def joined(self, others: Images) -> Images:
        """Return these images and others as one split, without a copy; the others' rows come after these."""
        stores = [
            store
            for pixels in (self.pixels, others.pixels)
            for store in (pixels.stores if isinstance(pixels, Stacked) else (pixels,))
        ]
        return Images(Stacked(*stores), torch.cat([self.labels, others.labels]))


@dataclass(frozen=True)
class Data:
    """A decoded data set with its facts."""

    train: Images
    test: Images
    class_names: tuple[str, ...]
    facts: DatasetFacts
    val: Images | None = None
    """The data's own validation split, which chooses the best epoch."""

    def to(self, device: torch.device | str) -> Data:
        val = None if self.val is None else self.val.to(device)
        return Data(self.train.to(device), self.test.to(device), self.class_names, self.facts, val)

    def without_validation(self) -> Data:
        """Return the data without its validation split, as earlier versions read it."""
        return replace(self, val=None, facts=self.facts.model_copy(update={"validation": 0}))


@dataclass(frozen=True)
class TrainingSet:
    """The images that a trial learns from, and those held out to choose its best epoch."""

    images: Images
    rows: Tensor
    """int64, on the images' device: the rows that are trained on. Views depend on the row, so `images` has all rows."""
    held_out: Images

    @classmethod
    def of(cls, train: Images, recipe: Training, validation: Images | None = None) -> TrainingSet:
        """Return the labelled training images without a stratified part, which is held out. If the data has a
        validation split, that is held out, and all training images are trained on."""
        if validation is not None:
            return cls(train, torch.arange(len(train), device=train.labels.device), validation)
        rows, held_out = split(train, recipe.validation_fraction, recipe.seed)
        return cls(train, rows.to(train.labels.device), train.part(held_out))

    def with_unlabelled(self, images: Images, options: Unlabelled) -> TrainingSet:
        """Return the set with unlabelled images added or in place of the labelled ones, and the same held-out rows."""
        count = len(self.images)
        added = torch.arange(count, count + len(images), device=self.rows.device)
        rows = torch.cat([self.rows, added]) if options.labelled_too else added
        return TrainingSet(self.images.joined(images), rows, self.held_out)

    def to(self, device: torch.device) -> TrainingSet:
        return TrainingSet(self.images.to(device), self.rows.to(device), self.held_out.to(device))


def split(images: Images, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and the rows to validate on, in rising order; see `set_aside`.

    Rows without a label (-1) are used for training, because nothing can be measured on them.
    """
    labels = images.labels.cpu().numpy()
    labelled = np.flatnonzero(labels >= 0)
    aside = np.zeros(len(labels), dtype=np.bool_)
    aside[labelled] = set_aside(labels[labelled], fraction, seed)
    return torch.from_numpy(np.flatnonzero(~aside)), torch.from_numpy(np.flatnonzero(aside))


def set_aside(labels: Labels, fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return True for the rows that are set aside: `fraction` of all, rounded, at least one, each class in proportion.

    A class never loses its last sample. A fraction of 0 sets nothing aside.
    """
    aside = np.zeros(len(labels), dtype=np.bool_)
    if fraction <= 0:
        return aside
    states = counter_rng.streams(counter_rng.key(seed), torch.arange(len(labels)))
    shuffled = torch.argsort(counter_rng.draws(states, 1)[0], stable=True).numpy()
    quotas = _quotas(np.bincount(labels), fraction)
    for label in np.flatnonzero(quotas):
        of_class = shuffled[labels[shuffled] == label]
        aside[of_class[: quotas[label]]] = True
    return aside


def _quotas(counts: npt.NDArray[np.int64], fraction: float) -> npt.NDArray[np.int64]:
    """Return the number of each class: the integer part of its share, plus one for the largest remainders."""
    shares = counts * fraction
    quotas = shares.astype(np.int64)
    wanted = max(1, round(float(counts.sum()) * fraction))
    for label in np.argsort(quotas - shares, kind="stable")[: max(0, wanted - int(quotas.sum()))]:
        quotas[label] += 1
    capped: npt.NDArray[np.int64] = np.minimum(quotas, np.maximum(counts - 1, 0))
    return capped
