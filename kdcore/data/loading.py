"""The data set that a spec names: a built-in one, or a file of arrays or of class folders."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from base.data_cache import DOWNLOADS
from base.errors import DatasetUnreadable
from base.files import sha256_of
from kdcore.catalog.datasets import DATASETS
from kdcore.catalog.facts import DATASET_READING, DatasetFacts
from kdcore.data.archive import LIMITS, Limits
from kdcore.data.builtin import open_digits, open_named
from kdcore.data.decoding import OnProgress, Source, Split, decode, decoded, with_options
from kdcore.data.forms import open_file
from kdcore.data.images import Data, Images, Resized, Store
from kdcore.data.streaming import Room, kept
from kdcore.data.thumbnails import Thumbnails
from kdcore.spec import DataOptions, Dataset


def load(dataset: Dataset, path: Path | None, cache: Path, room: Room | None = None) -> Data:
    """Return the data set that a spec names: a built-in one, or the file at `path`. Decoded once into `cache`, if there
    is room.

    Raises DatasetUnreadable if it has no labels: a student could not be measured on it.
    """
    loaded = _load(dataset, path, cache, room or Room())
    if not loaded.facts.labelled:
        raise DatasetUnreadable(
            f"{dataset.source} holds images without labels; a student is measured on labelled ones.",
            "Add y_train to the arrays, or put each picture in the folder of its class. Images without labels can only "
            "be distilled onto, beside a labelled data set.",
        )
    return loaded


def load_unlabelled(
    dataset: Dataset, path: Path | None, cache: Path, like: DatasetFacts, room: Room | None = None
) -> Images:
    """Return images to distil onto, each labelled -1: those of a file without labels, or any training split with
    its labels dropped. Raises DatasetUnreadable if they differ from `like` in channels or size."""
    loaded = _load(dataset, path, cache, room or Room())
    if loaded.facts.channels != like.channels:
        raise DatasetUnreadable(
            f"The images of {dataset.source} have {loaded.facts.channels} channels, those of the data set "
            f"{like.channels}.",
            f"Convert them to {'grey' if like.channels == 1 else 'RGB'} first, or read both with "
            f"dataset.channels: {like.channels}.",
        )
    if loaded.facts.image_size != like.image_size:
        (height, width), (wanted_height, wanted_width) = loaded.facts.image_size, like.image_size
        raise DatasetUnreadable(
            f"The images of {dataset.source} are {width} x {height} pixels, those of the data set "
            f"{wanted_width} x {wanted_height}.",
            "Bring both to one size with image_size, or resize the files.",
        )
    return Images(loaded.train.pixels, torch.full_like(loaded.train.labels, -1))


def enlarges(dataset: Dataset) -> bool:
    """Return True if the pictures are stored at their own size: what is larger is then made of it in reading."""
    named = DATASETS.get(dataset.source)
    return dataset.image_size is None and not (named is not None and named.resizable)


def with_sizes(
    splits: Mapping[Split, Images],
    sides: Iterable[int],
    wide: int | None,
    enlarged: bool,
    dataset: Dataset,
    path: Path | None,
    cache: Path,
    room: Room | None = None,
) -> dict[Split, Images]:
    """Return splits that `load` has returned, with their pictures as squares of these sides, too; and the training
    split with a store for boxes, of the side `wide`.

    The pictures of a side are decoded from the files, and cached, as if it were `dataset.image_size`. If pictures are
    `enlarged`, larger ones are made in reading instead: all of their pixels are stored already.
    """
    room = room or Room()
    sized: dict[Split, dict[int, Store]] = {split: {} for split in splits}
    for side in sides:
        if enlarged and all(side > images.pixels.shape[2] for images in splits.values()):
            other: dict[Split, Store] = {split: Resized(images.pixels, side) for split, images in splits.items()}
        else:
            read = _load(_at_side(dataset, side), path, cache, room)
            other = {"train": read.train.pixels, "test": read.test.pixels}
        for split in splits:
            sized[split][side] = other[split]
    found = {split: replace(images, sized=sized[split]) for split, images in splits.items()}
    if wide is not None:
        found["train"] = replace(found["train"], wide=_load(_at_side(dataset, wide), path, cache, room).train.pixels)
    return found


def _at_side(dataset: Dataset, side: int) -> Dataset:
    """Return the data set read at another size, so that the same part of each picture is seen."""
    resize_to = dataset.resize_to
    if resize_to is not None and dataset.image_size is not None:
        resize_to = max(side, round(resize_to * side / dataset.image_size))
    return dataset.model_copy(update={"image_size": side, "resize_to": resize_to})


def inspect(
    path: Path,
    options: DataOptions | None = None,
    on_progress: OnProgress | None = None,
    thumbnails: Thumbnails | None = None,
) -> DatasetFacts:
    """Return the facts of a file after decoding every image. Raises DatasetUnreadable with the files or row at
    fault. `thumbnails` take their images in the same pass."""
    source = _open(path, options or DataOptions())
    require_short_names(source.class_names)
    if thumbnails is not None:
        source = thumbnails.watch(source)
    return source.facts(decode(source, on_progress=on_progress), f"sha256:{sha256_of(path)}")


def require_short_names(names: Sequence[str], limits: Limits = LIMITS) -> None:
    """Raise DatasetUnreadable unless the names of the classes are few and short enough to be listed.

    It is a rule of new registrations, not of data sets that were registered before.
    """
    if len(names) > limits.classes:
        raise DatasetUnreadable(f"The data set has {len(names):,} classes; the most is {limits.classes:,}.")
    for number, name in enumerate(names):
        if len(name) > limits.name_characters:
            raise DatasetUnreadable(
                f"The name of class {number} has {len(name):,} characters; the most is {limits.name_characters}.",
                "Give shorter names, or register it with class_names.",
            )
    if (total := sum(map(len, names))) > limits.names_characters:
        raise DatasetUnreadable(
            f"The names of the classes have {total:,} characters; the most is {limits.names_characters:,}.",
            "Give shorter names, or register it with class_names.",
        )


def _load(dataset: Dataset, path: Path | None, cache: Path, room: Room) -> Data:
    name, options = dataset.source, dataset.options
    if path is not None:
        digest = name.removeprefix("blob:") if name.startswith("blob:") else f"sha256:{sha256_of(path)}"
        key = _key(digest.removeprefix("sha256:"), options)
        return kept(key, digest, cache, lambda: _open(path, options), room, path, options)
    if name not in DATASETS:
        raise DatasetUnreadable(f"There is no built-in data set {name!r}.", "Built in are " + ", ".join(DATASETS) + ".")
    if DATASETS[name].source == "bundled":
        return decoded(with_options(open_digits(options), options))
    return kept(
        _key(name, options),
        None,
        cache,
        lambda: with_options(open_named(name, options, cache / DOWNLOADS), options),
        room,
    )


def _key(source: str, options: DataOptions) -> str:
    """Return the name of an entry in the cache. Options that change nothing are not in it."""
    deciding = options.deciding()
    size = deciding.pop("image_size", "native")
    more = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
    return f"{source}-{size}{f'-{more}' if deciding else ''}-v{DATASET_READING}"


def _open(path: Path, options: DataOptions) -> Source:
    return with_options(open_file(path, options), options)
