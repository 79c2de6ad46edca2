"""Images to train on: looked at, decoded once, and seen through reproducible views."""

import hashlib
import zipfile
from pathlib import Path

import torch

from base.errors import DatasetUnreadable
from kdcore.catalog.datasets import DATASETS
from kdcore.catalog.facts import DatasetFacts
from kdcore.data.arrays import open_arrays
from kdcore.data.cache import cached, decoded
from kdcore.data.digits import open_digits
from kdcore.data.folders import open_folders
from kdcore.data.material import Material, material, with_unlabelled
from kdcore.data.named import open_named
from kdcore.data.resident import Data, Images, joined
from kdcore.data.source import Source, Sums
from kdcore.data.stratified import split
from kdcore.data.views import Views, order
from kdcore.spec import Dataset

__all__ = [
    "Data",
    "Images",
    "Material",
    "Views",
    "inspect",
    "joined",
    "load",
    "load_unlabelled",
    "material",
    "order",
    "split",
    "with_unlabelled",
]

_FORMAT = 1
"""Part of every cache key: raise it when the same file would be decoded to other bytes."""
_BLOB = "blob:"


def load(dataset: Dataset, path: Path | None, cache: Path) -> Data:
    """The data set that a spec names: a built-in one, or the file at `path`. Decoded once into `cache`.

    Raises DatasetUnreadable where it has no labels: there would be nothing to measure a student on.
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
    """Images to distil onto, each labelled -1: those of a file without labels, or any data set's training split with
    its labels dropped. Raises DatasetUnreadable where they differ from `like` in channels or size."""
    loaded = _load(dataset, path, cache)
    _refuse_other_images(dataset.source, loaded.facts, like)
    return Images(loaded.train.pixels, torch.full_like(loaded.train.labels, -1))


def _refuse_other_images(source: str, facts: DatasetFacts, like: DatasetFacts) -> None:
    if facts.channels != like.channels:
        raise DatasetUnreadable(
            f"The images of {source} have {facts.channels} channels, those of the data set {like.channels}.",
            f"Convert them to {'grey' if like.channels == 1 else 'RGB'} first.",
        )
    if facts.image_size != like.image_size:
        (height, width), (wanted_height, wanted_width) = facts.image_size, like.image_size
        raise DatasetUnreadable(
            f"The images of {source} are {width} x {height} pixels, those of the data set "
            f"{wanted_width} x {wanted_height}.",
            "Bring both to one size with image_size, or resize the files.",
        )


def _load(dataset: Dataset, path: Path | None, cache: Path) -> Data:
    size = dataset.image_size
    if path is None:
        return _named(dataset.source, size, cache)
    digest = dataset.source.removeprefix(_BLOB) if dataset.source.startswith(_BLOB) else _digest(path)
    return cached(_key(digest.removeprefix("sha256:"), size), digest, cache, lambda: _open(path, size))


def inspect(path: Path, image_size: int | None) -> DatasetFacts:
    """What is in the file, every image decoded on the way; raises DatasetUnreadable naming the file or row at fault."""
    source = _open(path, image_size)
    sums = Sums(source.channels)
    for name, _, pixels in source.pieces():
        if name == "train":
            sums.add(pixels)
    mean, std = sums.mean_and_std()
    return source.facts(mean, std, _digest(path))


def _named(name: str, size: int | None, cache: Path) -> Data:
    if name not in DATASETS:
        raise DatasetUnreadable(f"There is no built-in data set {name!r}.", "Built in are " + ", ".join(DATASETS) + ".")
    if DATASETS[name].source == "bundled":
        return decoded(open_digits(size))
    return cached(_key(name, size), None, cache, lambda: open_named(name, size, cache / "downloads"))


def _key(what: str, size: int | None) -> str:
    return f"{what}-{size or 'native'}-v{_FORMAT}"


def _open(path: Path, image_size: int | None) -> Source:
    """By content, not by name: both an `.npz` and a `.zip` are zip files."""
    if not path.is_file():
        raise DatasetUnreadable(f"{path.name} is not a file.", "Pack a folder into a .zip or .tar.gz first.")
    return open_arrays(path, image_size) if _holds_arrays(path) else open_folders(path, image_size)


def _holds_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") and "/" not in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
