"""Decoded images (bytes in one block, in memory or mapped from a file), and their division for a training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcore.catalog.facts import DatasetFacts
from kdcore.data import counter_rng, resizing
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


class Resized:
    """Pixels of which rows are resized to a square when they are read.

    It has the methods of a tensor that a batch needs, on any device.
    """

    def __init__(self, stored: Store, side: int) -> None:
        self.stored, self.side = stored, side

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.stored.shape[:2], self.side, self.side])

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def __len__(self) -> int:
        return self.shape[0]

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return resizing.resized(self.stored.index_select(dim, index), (self.side, self.side))

    def __getitem__(self, rows: slice) -> Tensor:
        return resizing.resized(self.stored[rows], (self.side, self.side))

    def to(self, device: torch.device | str) -> Resized:
        return Resized(self.stored.to(device), self.side)


Store: TypeAlias = "Tensor | Stacked | Streamed | Resized"
"""The pixels of a split, uint8 N × C × H × W."""


@dataclass(frozen=True)
class Images:
    """One split: pixels uint8 N × C × H × W, labels int64 N (-1 without a label). A batch is a gather of rows."""

    pixels: Store
    labels: Tensor
    sized: Mapping[int, Store] = field(default_factory=dict)
    """The same pictures as squares of other sides, for teachers with image sizes of their own."""
    wide: Store | None = None
    """The same pictures in a larger size, from which boxes are cut for all sizes. None: from each size's own."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """Return the split on another device. A mapped split is then read completely."""
        pixels, wide = self.pixels.to(device), None if self.wide is None else self.wide.to(device)
        sized = {
            side: self._resized_from(store, pixels, wide) or store.to(device) for side, store in self.sized.items()
        }
        return Images(pixels, self.labels.to(device), sized, wide)

    def _resized_from(self, store: Store, pixels: Store, wide: Store | None) -> Resized | None:
        """Return the same of other `pixels` and `wide` if a store is made of this split's: no copy is needed for it."""
        if isinstance(store, Resized) and store.stored is self.pixels:
            return Resized(pixels, store.side)
        if isinstance(store, Resized) and wide is not None and store.stored is self.wide:
            return Resized(wide, store.side)
        return None

    def read(self, index: Tensor) -> list[Tensor]:
        """Return the pixels of some rows: of the data's own size, then of each in `sized`."""
        own = self.pixels.index_select(0, index)
        return [
            own,
            *(
                resizing.resized(own, (store.side, store.side))
                if isinstance(store, Resized) and store.stored is self.pixels
                else store.index_select(0, index)
                for store in self.sized.values()
            ),
        ]

    def at(self, side: int | None) -> Images:
        """Return the split at one size alone: the data's own for None."""
        return Images(self.pixels if side is None else self.sized[side], self.labels)

    def take(self, index: Tensor) -> Images:
        """Return a copy of some rows, as they are evaluated. The images of a training are indexed instead: views depend
        on the row number."""
        index = index.to(self.pixels.device)
        pixels, *sized = self.read(index)
        return Images(pixels, self.labels.index_select(0, index), dict(zip(self.sized, sized, strict=True)))

    def part(self, index: Tensor) -> Images:
        """Return some rows as a split of its own: a copy, or rows of a file that are decoded when they are needed."""
        if isinstance(self.pixels, Tensor | Stacked | Resized):
            return self.take(index)
        return Images(self.pixels.part(index), self.labels.index_select(0, index.to(self.labels.device)))

    def expect(self, rows: Tensor) -> None:
        """Say which rows are taken next, in this order: those of a file are decoded ahead."""
        for store in (self.pixels, *self.sized.values()) if self.wide is None else (self.wide,):
            # What is resized is made of another store's rows.
            if not isinstance(store, Tensor | Resized):
                store.expect(rows)

    def joined(self, others: Images) -> Images:
        """Return these images and others as one split, without a copy; the others' rows come after these."""
        assert (self.wide is None) == (others.wide is None), "`with_sizes` stores labelled and unlabelled images alike"
        pixels = _stacked(self.pixels, others.pixels)
        wide = None if self.wide is None or others.wide is None else _stacked(self.wide, others.wide)
        sized = {
            side: self._resized_from(store, pixels, wide) or _stacked(store, others.sized[side])
            for side, store in self.sized.items()
        }
        return Images(pixels, torch.cat([self.labels, others.labels]), sized, wide)

    def for_training(self, sides: Collection[int]) -> Images:
        """Return what views at the data's own size and at these sides are made of: a wide store is enough for boxes."""
        if self.wide is None:
            sized = {side: self.sized[side] for side in sides}
        else:
            sized = {side: Resized(self.wide, side) for side in sides}
        return replace(self, sized=sized)


def _stacked(first: Store, second: Store) -> Stacked:
    """Return the rows of the first, then those of the second."""
    stores: list[Tensor | Streamed] = []
    for one in (first, second):
        assert not isinstance(one, Resized), "`with_sizes` stores labelled and unlabelled images alike"
        stores += one.stores if isinstance(one, Stacked) else (one,)
    return Stacked(*stores)


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
        return cls(train, rows.to(train.labels.device), train.at(None).part(held_out))

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
