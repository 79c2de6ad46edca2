"""The data set that a spec names: a built-in one, or a file of arrays or of class folders."""

from collections.abc import Callable
from pathlib import Path

import torch

from base.data_cache import DOWNLOADS
from base.errors import DatasetUnreadable
from base.files import sha256_of
from kdcore.catalog.datasets import DATASETS
from kdcore.catalog.facts import DATASET_READING, DatasetFacts
from kdcore.data.builtin import open_digits, open_named
from kdcore.data.decoding import Sums, cached, decoded
from kdcore.data.forms import open_file
from kdcore.data.images import Data, Images
from kdcore.spec import Dataset


def load(dataset: Dataset, path: Path | None, cache: Path) -> Data:
    """Return the data set that a spec names: a built-in one, or the file at `path`. Decoded once into `cache`.

    Raises DatasetUnreadable if it has no labels: a student could not be measured on it.
    """
    loaded = _load(dataset, path, cache)
    if not loaded.facts.labelled:
        raise DatasetUnreadable(
            f"{dataset.source} holds images without labels; a student is measured on labelled ones.",
            "Add y_train to the arrays, or put each picture in the folder of its class. Images without labels can only "
            "be distilled onto, beside a labelled data set.",
        )
    return loaded


def load_unlabelled(dataset: Dataset, path: Path | None, cache: Path, like: DatasetFacts) -> Images:
    """Return images to distil onto, each labelled -1: those of a file without labels, or any training split with
    its labels dropped. Raises DatasetUnreadable if they differ from `like` in channels or size."""
    loaded = _load(dataset, path, cache)
    if loaded.facts.channels != like.channels:
        raise DatasetUnreadable(
            f"The images of {dataset.source} have {loaded.facts.channels} channels, those of the data set "
            f"{like.channels}.",
            f"Convert them to {'grey' if like.channels == 1 else 'RGB'} first.",
        )
    if loaded.facts.image_size != like.image_size:
        (height, width), (wanted_height, wanted_width) = loaded.facts.image_size, like.image_size
        raise DatasetUnreadable(
            f"The images of {dataset.source} are {width} x {height} pixels, those of the data set "
            f"{wanted_width} x {wanted_height}.",
            "Bring both to one size with image_size, or resize the files.",
        )
    return Images(loaded.train.pixels, torch.full_like(loaded.train.labels, -1))


def inspect(path: Path, image_size: int | None, on_progress: Callable[[int, int], None] | None = None) -> DatasetFacts:
    """Return the facts of a file after decoding every image. Raises DatasetUnreadable with the file or row at fault.

    `on_progress` gets the number of decoded images and that of all, after every few hundred.
    """
    source = open_file(path, image_size)
    sums = Sums(source.channels)
    done, total = 0, sum(map(len, source.labels.values()))
    for name, _, pixels in source.pieces():
        if name == "train":
            sums.add(pixels)
        done += len(pixels)
        if on_progress is not None:
            on_progress(done, total)
    mean, std = sums.mean_and_std()
    return source.facts(mean, std, f"sha256:{sha256_of(path)}")


def _load(dataset: Dataset, path: Path | None, cache: Path) -> Data:
    name, size = dataset.source, dataset.image_size
    if path is not None:
        digest = name.removeprefix("blob:") if name.startswith("blob:") else f"sha256:{sha256_of(path)}"
        return cached(_key(digest.removeprefix("sha256:"), size), digest, cache, lambda: open_file(path, size))
    if name not in DATASETS:
        raise DatasetUnreadable(f"There is no built-in data set {name!r}.", "Built in are " + ", ".join(DATASETS) + ".")
    if DATASETS[name].source == "bundled":
        return decoded(open_digits(size))
    return cached(_key(name, size), None, cache, lambda: open_named(name, size, cache / DOWNLOADS))


def _key(source: str, size: int | None) -> str:
    return f"{source}-{size or 'native'}-v{DATASET_READING}"
