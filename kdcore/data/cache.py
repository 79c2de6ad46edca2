"""Decode once: a data set's pixels and labels as `.npy` files in the cache folder, under the digest they came from.

An entry is a folder that appears whole or not at all: it is filled under another name, synced, then renamed. Whoever
fills it holds a lock, so two jobs never decode the same archive side by side, and what a killed one left half done
belongs to nobody and is removed.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from base.errors import StorageFull
from base.files import DISK_FULL, sync
from kdcore.catalog.facts import DatasetFacts
from kdcore.data.resident import Data, Images
from kdcore.data.source import Pixels, Source, Split, Sums

RESIDENT_BYTES = 2 << 30
"""Splits larger than this stay in their file and are mapped: the kernel keeps what there is room for."""
_SPLITS: tuple[Split, Split] = ("train", "test")
_FACTS = "facts.json"


def cached(
    key: str, digest: str | None, cache: Path, source: Callable[[], Source], resident_bytes: int = RESIDENT_BYTES
) -> Data:
    """The data set under `key`, decoded from `source` unless it is there already."""
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with alone(cache / f"{key}.lock"):
            if not folder.exists():
                _fill(folder, digest, source())
            # While nobody else may enter: whoever trims the cache looks at when an entry was last used.
            os.utime(folder)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise StorageFull(f"No room to decode the data set: {error.strerror}.", "Free some disk space.") from error
        raise
    return _read(folder, resident_bytes)


def decoded(source: Source) -> Data:
    """The data set in memory, without a cache: for small ones."""
    pixels = {split: np.empty(_shape(source, split), dtype=np.uint8) for split in _SPLITS}
    mean, std = _decode(source, pixels)
    splits = {s: Images(torch.from_numpy(pixels[s]), torch.from_numpy(source.labels[s])) for s in _SPLITS}
    return Data(splits["train"], splits["test"], source.class_names, source.facts(mean, std, None))


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold an advisory lock, which ends with the process however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(folder: Path, digest: str | None, source: Source) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    pixels = {split: _mapped(_pixels(partial, split), _shape(source, split)) for split in _SPLITS}
    mean, std = _decode(source, pixels)
    for split in _SPLITS:
        pixels[split].flush()
        np.save(_labels(partial, split), source.labels[split])
    (partial / _FACTS).write_text(source.facts(mean, std, digest).model_dump_json())
    for path in [*partial.iterdir(), partial]:
        sync(path)
    partial.rename(folder)
    sync(folder.parent)


def _mapped(path: Path, shape: tuple[int, int, int, int]) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
    """A new array on disk. Its blocks are claimed now: writing to a map on a full disk would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _decode(source: Source, pixels: Mapping[Split, Pixels]) -> tuple[list[float], list[float]]:
    """Fill both splits in one pass; mean and std of the training split."""
    sums = Sums(source.channels)
    for split, rows, piece in source.pieces():
        pixels[split][rows] = piece
        if split == "train":
            sums.add(piece)
    return sums.mean_and_std()


def _read(folder: Path, resident_bytes: int) -> Data:
    facts = DatasetFacts.model_validate_json((folder / _FACTS).read_bytes())
    train, test = (_images(folder, split, resident_bytes) for split in _SPLITS)
    return Data(train, test, tuple(facts.class_names), facts)


def _images(folder: Path, split: Split, resident_bytes: int) -> Images:
    path = _pixels(folder, split)
    # Mapped copy-on-write: torch wants writable memory, and nobody shall write to the cache.
    pixels = np.load(path, mmap_mode="c" if path.stat().st_size > resident_bytes else None)
    return Images(torch.from_numpy(pixels), torch.from_numpy(np.load(_labels(folder, split))))


def _shape(source: Source, split: Split) -> tuple[int, int, int, int]:
    return len(source.labels[split]), source.channels, source.height, source.width


def _pixels(folder: Path, split: Split) -> Path:
    return folder / f"{split}_pixels.npy"


def _labels(folder: Path, split: Split) -> Path:
    return folder / f"{split}_labels.npy"
