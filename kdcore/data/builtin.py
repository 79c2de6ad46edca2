"""The built-in data sets: handwritten digits that come with the package, and those that torchvision downloads.

`digits` are 1,797 images of 8 × 8 pixels, on which every method can be tried in seconds; their source is in
files/README.md. 360 of them, each digit in proportion, are the test split. Downloads go to the cache folder, once, and
torchvision compares their checksums.
"""

import csv
import gzip
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from base.data_cache import lock_of, partial_of
from base.errors import DatasetUnreadable
from kdcore import vision
from kdcore.catalog.datasets import DATASETS
from kdcore.data import image_files
from kdcore.data.arrays import resized
from kdcore.data.decoding import Piece, Source, Split, alone
from kdcore.data.images import Labels, set_aside
from kdcore.spec import DataOptions

TEST_DIGITS = 360
_SIDE = 8
_FULL_INK = 16
_SPLIT_SEED = 0
_CHUNK = 256


def open_digits(options: DataOptions | None = None) -> Source:
    """The bundled digits."""
    options = options or DataOptions()
    packed = files("kdcore.data").joinpath("files/digits.csv.gz").read_bytes()
    table = np.array(list(csv.reader(gzip.decompress(packed).decode().splitlines())), dtype=np.int64)
    ink, digits = table[:, :-1].reshape(-1, 1, _SIDE, _SIDE), table[:, -1]
    pixels = resized(np.rint(ink * (255 / _FULL_INK)).astype(np.uint8), options)
    held_out = set_aside(digits, TEST_DIGITS / len(digits), _SPLIT_SEED)
    splits: dict[Split, npt.NDArray[np.bool_]] = {"train": ~held_out, "test": held_out}
    return Source(
        kind="named",
        class_names=tuple("0123456789"),
        channels=1,
        height=options.image_size or _SIDE,
        width=options.image_size or _SIDE,
        labels={split: digits[rows] for split, rows in splits.items()},
        test_carved=False,
        pieces=lambda: (Piece(split, np.arange(rows.sum()), pixels[rows]) for split, rows in splits.items()),
    )


_Opener = Callable[[Any, Path, Split], Any]
"""A function of torchvision's `datasets`, a folder and a split. Its result has len() and [i] → (picture, label)."""


def _by_flag(name: str, datasets: Any, root: Path, split: Split) -> Any:
    return getattr(datasets, name)(root, train=split == "train", download=True)


def _by_split(name: str, spelled: dict[Split, str], datasets: Any, root: Path, split: Split, **options: Any) -> Any:
    return getattr(datasets, name)(root, split=spelled[split], download=True, **options)


OPENERS: dict[str, _Opener] = {
    "cifar10": partial(_by_flag, "CIFAR10"),
    "cifar100": partial(_by_flag, "CIFAR100"),
    "mnist": partial(_by_flag, "MNIST"),
    "fashion_mnist": partial(_by_flag, "FashionMNIST"),
    "kmnist": partial(_by_flag, "KMNIST"),
    "stl10": partial(_by_split, "STL10", {"train": "train", "test": "test"}),
    "imagenette": partial(_by_split, "Imagenette", {"train": "train", "test": "val"}, size="160px"),
    "oxford_iiit_pet": partial(_by_split, "OxfordIIITPet", {"train": "trainval", "test": "test"}),
    "food101": partial(_by_split, "Food101", {"train": "train", "test": "test"}),
    "dtd": partial(_by_split, "DTD", {"train": "train", "test": "test"}),
}


def open_named(name: str, options: DataOptions | None, downloads: Path) -> Source:
    """Open a data set of torchvision, downloaded if needed. Raises DatasetUnreadable if that fails."""
    facts, options = DATASETS[name], options or DataOptions()
    splits = _fetched(name, downloads)
    if options.image_size is None and facts.resizable:
        options = options.model_copy(update={"image_size": min(facts.image_size)})
    height, width = (options.image_size, options.image_size) if options.image_size else facts.image_size
    return Source(
        kind="named",
        class_names=tuple(facts.class_names) or tuple(splits["train"].classes),
        channels=facts.channels,
        height=height,
        width=width,
        labels={split: _labels(dataset) for split, dataset in splits.items()},
        test_carved=False,
        pieces=lambda: _pieces(splits, facts.channels, options),
    )


def _fetched(name: str, downloads: Path) -> dict[Split, Any]:
    """Both splits. A folder of that name is whole: downloading and unpacking happen under another name."""
    root = downloads / name
    partial_root = partial_of(root)
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with alone(lock_of(root)):
            if not root.exists():
                shutil.rmtree(partial_root, ignore_errors=True)
                partial_root.mkdir()
                _open(name, partial_root)
                partial_root.rename(root)
        return _open(name, root)
    except (OSError, RuntimeError) as error:
        raise DatasetUnreadable(
            f"The data set {name!r} could not be downloaded: {error}.",
            "If this machine cannot reach the data set's server, upload the images as a data set of your own.",
        ) from error


def _open(name: str, root: Path) -> dict[Split, Any]:
    datasets = vision.torchvision().datasets
    return {split: OPENERS[name](datasets, root, split) for split in ("train", "test")}


def _labels(dataset: Any) -> Labels:
    """Return the labels, which torchvision's data sets store under different names, or only beside each picture."""
    labels = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None)
    if labels is None:
        labels = [label for _, label in (dataset[row] for row in range(len(dataset)))]
    return np.asarray(labels, dtype=np.int64)


def _pieces(splits: dict[Split, Any], channels: int, options: DataOptions) -> Iterator[Piece]:
    for split, dataset in splits.items():
        for start in range(0, len(dataset), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(dataset)))
            pixels = [image_files.planes(dataset[int(row)][0], channels, options) for row in rows]
            yield Piece(split, rows, np.stack(pixels))
