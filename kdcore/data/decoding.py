"""The decoding of data sets: a `Source` for every kind of file, which is decoded once, into the cache.

A source has its labels before any image is decoded. Its pixels come in pieces with their row numbers, in the
file's own order, so that one pass over an archive is enough.

The cache holds each data set's pixels and labels as `.npy` files in a folder named by the file's digest. The folder
is complete or absent: it is filled under another name, synced, then renamed. A lock is held while it is filled,
so two jobs never decode the same archive at the same time. The incomplete folder of a killed job is deleted.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from base.data_cache import lock_of, partial_of
from base.errors import DatasetUnreadable
from base.files import disk_full_as_storage_full, sync
from kdcore.catalog.facts import DATASET_READING, DatasetFacts, LeftOut
from kdcore.data.images import Data, Images, Labels, set_aside

Split = Literal["train", "val", "test"]
"""`val` chooses the best epoch; it exists only beside a test split that the data has by itself."""
Pixels = npt.NDArray[np.uint8]
CARVED_FRACTION = 0.1
_CARVING_SEED = 0
RESIDENT_BYTES = 2 << 30
"""Splits larger than this are not loaded; their file is mapped into memory."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")
_FACTS = "facts.json"
_SUMMED_AT_ONCE = 1 << 18


class Piece(NamedTuple):
    """Some decoded images (uint8 n × C × H × W) and the rows of a split that they fill."""

    split: Split
    rows: npt.NDArray[np.int64]
    pixels: Pixels


@dataclass(frozen=True)
class Source:
    """A data set that is not decoded yet. Without labels it has no class names and no test rows."""

    kind: Literal["arrays", "folders", "named"]
    class_names: tuple[str, ...]
    channels: int
    height: int
    width: int
    labels: dict[Split, Labels]
    test_carved: bool
    pieces: Callable[[], Iterator[Piece]]
    layout: str = ""
    splits: Mapping[str, int] = field(default_factory=dict)
    left_out: Sequence[LeftOut] = ()
    merged: Sequence[str] = ()

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
            validation=len(self.labels.get("val", ())),
            layout=self.layout,
            splits=dict(self.splits),
            class_counts=self._class_counts(),
            left_out=list(self.left_out),
            merged=list(self.merged),
            reading=DATASET_READING,
            mean=mean,
            std=std,
            digest=digest,
        )

    def _class_counts(self) -> dict[str, list[int]]:
        classes = len(self.class_names)
        return {s: np.bincount(self.labels[s], minlength=classes).tolist() for s in self.present} if classes else {}

    @property
    def present(self) -> list[Split]:
        """The splits of this data set; a validation split is often absent."""
        return [split for split in SPLITS if split in self.labels]

    def shape(self, split: Split) -> tuple[int, int, int, int]:
        return len(self.labels[split]), self.channels, self.height, self.width


class Sums:
    """Per-channel mean and standard deviation of pixels scaled to 0..1, from exact integer sums."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sum = np.zeros(channels, dtype=np.int64)
        self._squares = np.zeros(channels, dtype=np.int64)

    def add(self, pixels: Pixels) -> None:
        """Add images, uint8 n × C × H × W."""
        images, channels, height, width = pixels.shape
        self._count += images * height * width
        # Vectors' products are several times faster than sums over axes, and exact: whole numbers below 2^53.
        step = max(1, _SUMMED_AT_ONCE // (height * width))
        for start in range(0, images, step):
            for channel in range(channels):
                values = pixels[start : start + step, channel].astype(np.float64).ravel()
                self._sum[channel] += int(values.sum())
                self._squares[channel] += int(values @ values)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        mean = self._sum / self._count
        variance = self._squares / self._count - mean**2
        # A constant channel would make normalisation divide by zero. Its deviation counts as one grey level.
        std = np.maximum(np.sqrt(np.maximum(variance, 0)), 1.0)
        return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]


def no_labels(images: int) -> dict[Split, Labels]:
    """Return the labels of unlabelled images: -1 for each, and an empty test split."""
    return {"train": np.full(images, -1, dtype=np.int64), "test": np.empty(0, dtype=np.int64)}


def carve(labels: Labels) -> npt.NDArray[np.bool_]:
    """Return True for the rows that become the test split of a data set without one: a tenth, always the same."""
    aside = set_aside(labels, CARVED_FRACTION, _CARVING_SEED)
    if not aside.any():
        raise DatasetUnreadable(
            f"There is no test split, and {len(labels)} images are too few to set some aside.",
            "Add a test split, or more images of each class.",
        )
    return aside


def require_all_classes(labels: Labels, class_names: tuple[str, ...]) -> None:
    """Raise DatasetUnreadable if a class has no training image. The usual reason is that the labels start at 1."""
    if len(class_names) < 2:
        raise DatasetUnreadable(f"There is only one class, {class_names[0]!r}.", "A classifier needs two or more.")
    absent = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if len(absent):
        raise DatasetUnreadable(
            f"No training image has label {absent[0]} (class {class_names[absent[0]]!r}).",
            "Labels run from 0 to the number of classes minus one, and each must occur in the training split.",
        )


def decoded(source: Source) -> Data:
    """Decode a small data set into memory, without the cache."""
    pixels = {split: np.empty(source.shape(split), dtype=np.uint8) for split in source.present}
    mean, std = _decode(source, pixels)
    splits = {s: Images(torch.from_numpy(pixels[s]), torch.from_numpy(source.labels[s])) for s in source.present}
    facts = source.facts(mean, std, None)
    return Data(splits["train"], splits["test"], source.class_names, facts, splits.get("val"))


def cached(
    key: str, digest: str | None, cache: Path, source: Callable[[], Source], resident_bytes: int = RESIDENT_BYTES
) -> Data:
    """Return the data set under `key`, decoded from `source` if it is not in the cache."""
    folder = cache / key
    with disk_full_as_storage_full(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with alone(lock_of(folder)):
            if not folder.exists():
                _fill(folder, digest, source())
            # Under the lock, because the trimming of the cache deletes entries by the time of their last use.
            os.utime(folder)
    facts = DatasetFacts.model_validate_json((folder / _FACTS).read_bytes())
    splits = {split: _images(folder, split, resident_bytes) for split in SPLITS if _pixels(folder, split).exists()}
    return Data(splits["train"], splits["test"], tuple(facts.class_names), facts, splits.get("val"))


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold an advisory lock. The system releases it when the process ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, digest: str | None, source: Source) -> None:
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    pixels = {split: _mapped(_pixels(partial, split), source.shape(split)) for split in source.present}
    mean, std = _decode(source, pixels)
    for split in source.present:
        pixels[split].flush()
        np.save(_labels(partial, split), source.labels[split])
    (partial / _FACTS).write_text(source.facts(mean, std, digest).model_dump_json())
    for path in [*partial.iterdir(), partial]:
        sync(path)
    partial.rename(folder)
    sync(folder.parent)


def _mapped(path: Path, shape: tuple[int, int, int, int]) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
    """Make an array on disk with allocated blocks, because a write to a map on a full disk would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _decode(source: Source, pixels: Mapping[Split, Pixels]) -> tuple[list[float], list[float]]:
    """Fill all splits in one pass; return mean and std of the training split."""
    sums = Sums(source.channels)
    for split, rows, piece in source.pieces():
        pixels[split][rows] = piece
        if split == "train":
            sums.add(piece)
    return sums.mean_and_std()


def _images(folder: Path, split: Split, resident_bytes: int) -> Images:
    path = _pixels(folder, split)
    # Mapped copy-on-write: torch needs writable memory, and the cached file must not change.
    pixels = np.load(path, mmap_mode="c" if path.stat().st_size > resident_bytes else None)
    return Images(torch.from_numpy(pixels), torch.from_numpy(np.load(_labels(folder, split))))


def _pixels(folder: Path, split: Split) -> Path:
    return folder / f"{split}_pixels.npy"


def _labels(folder: Path, split: Split) -> Path:
    return folder / f"{split}_labels.npy"
