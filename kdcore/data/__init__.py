"""Images to train on: looked at, decoded once, and seen through reproducible views."""

import hashlib
import zipfile
from pathlib import Path

from kdcore.catalog.datasets import DATASETS
from kdcore.catalog.facts import DatasetFacts
from kdcore.data.arrays import open_arrays
from kdcore.data.cache import cached, decoded
from kdcore.data.digits import open_digits
from kdcore.data.folders import open_folders
from kdcore.data.named import open_named
from kdcore.data.resident import Data, Images
from kdcore.data.source import Source, Sums
from kdcore.data.stratified import split
from kdcore.data.views import Views, order
from kdcore.errors import DatasetUnreadable
from kdcore.spec import Dataset

__all__ = ["Data", "Images", "Views", "inspect", "load", "order", "split"]

_FORMAT = 1
"""Part of every cache key: raise it when the same file would be decoded to other bytes."""
_BLOB = "blob:"


def load(dataset: Dataset, path: Path | None, cache: Path) -> Data:
    """The data set that a spec names: a built-in one, or the file at `path`. Decoded once into `cache`."""
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
