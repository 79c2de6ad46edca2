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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import torch

from base.data_cache import lock_of, partial_of
from base.errors import DatasetUnreadable
from base.files import disk_full_as_storage_full, sync
from kdcore.catalog.facts import DATASET_READING, DatasetFacts, LeftOut
from kdcore.data import counter_rng
from kdcore.data.archive import Place
from kdcore.data.images import Data, Images, Labels, set_aside
from kdcore.spec import DataOptions

Split = Literal["train", "val", "test"]
"""`val` chooses the best epoch; it exists only beside a test split that the data has by itself."""
Pixels = npt.NDArray[np.uint8]
CARVED_FRACTION = 0.1
_CARVING_SEED = 0
_LIMIT = 4
"""Tells the draw of `limit` from other draws with the same seed."""
NAMED = 20
"""Image files that cannot be read, or have another name in a table, and are named."""
_LONGEST_NAME = 200
LOCK_POLL_S = 1.0
"""The time between two looks at a lock that another process holds."""
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


class Encoded(NamedTuple):
    """A picture's file, its name, and the row of a split that it fills."""

    split: Split
    row: int
    name: str
    blob: bytes
    pixels: int = 0
    """Height times width, from its header."""
    place: Place | None = None
    """Where the file is in the data set's file, if it can be read from there."""


OnEncoded = Callable[[Encoded], None]


@dataclass(frozen=True)
class Codec:
    """How one picture's bytes become pixels, beside the data set's options. Plain data: it is kept in a file."""

    channels: int
    """1 or 3: those to which a picture's file is decoded."""
    array: tuple[int, ...] | None = None
    """The shape of an image in an array of bytes; None for the file of a picture."""
    converted: int | None = None
    """The channels that the decoded picture is brought to; None if they stay as they are."""


@dataclass(frozen=True)
class Stream:
    """How a source's pictures can be decoded one by one, in any order, from the file itself."""

    codec: Codec
    pieces: Callable[[OnEncoded], Iterator[Piece]]
    """As `Source.pieces`. Each picture is also given to the function, with its place in the file if it has one."""


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
    stream: Stream | None = None
    """None if pictures can only be decoded one after the other."""
    layout: str = ""
    splits: Mapping[str, int] = field(default_factory=dict)
    left_out: Sequence[LeftOut] = ()
    merged: Sequence[str] = ()
    repeated: Sequence[str] = ()
    respelled: Sequence[tuple[str, str]] = ()
    """Names in a table, with those of the files that differ from them in case or suffix."""
    pictures: Mapping[str, int] = field(default_factory=dict)
    pixels_cut: float = 0.0
    own_side: int | None = None
    skipped: Sequence[str] = ()
    """The names of image files that were left out."""

    def facts(self, sums: "Sums", digest: str | None) -> DatasetFacts:
        mean, std = sums.mean_and_std()
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
            repeated=list(self.repeated),
            respelled=len(self.respelled),
            respelled_names={one[:_LONGEST_NAME]: other[:_LONGEST_NAME] for one, other in self.respelled[:NAMED]},
            reading=DATASET_READING,
            mean=mean,
            std=std,
            digest=digest,
            grey=sums.grey,
            largest=sums.largest,
            pictures=dict(self.pictures),
            pixels_cut=self.pixels_cut,
            own_side=self.own_side,
            skipped=len(self.skipped),
            skipped_names=list(self.skipped[:NAMED]),
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

    @property
    def bytes(self) -> int:
        """The size of all pixels when they are decoded."""
        return sum(map(len, self.labels.values())) * self.channels * self.height * self.width


class Sums:
    """Per-channel mean and standard deviation of pixels scaled to 0..1, from exact integer sums; and if all images are
    grey, or all the same, and the largest value."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._sum = np.zeros(channels, dtype=np.int64)
        self._squares = np.zeros(channels, dtype=np.int64)
        self._first: Pixels | None = None
        self.images = 0
        self.all_equal = True
        self.grey = True
        self.largest = 0

    def add(self, pixels: Pixels) -> None:
        """Add images, uint8 n × C × H × W."""
        images, channels, height, width = pixels.shape
        self.images += images
        if self._first is None:
            self._first = pixels[0].copy()
        self.all_equal = self.all_equal and bool((pixels == self._first).all())
        self.grey = self.grey and (channels == 1 or bool((pixels == pixels[:, :1]).all()))
        self.largest = max(self.largest, int(pixels.max(initial=0)))
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


def decoded(source: Source, digest: str | None = None) -> Data:
    """Decode a small data set into memory, without the cache."""
    pixels = {split: np.empty(source.shape(split), dtype=np.uint8) for split in source.present}
    sums = decode(source, pixels)
    splits = {s: Images(torch.from_numpy(pixels[s]), torch.from_numpy(source.labels[s])) for s in source.present}
    return Data(splits["train"], splits["test"], source.class_names, source.facts(sums, digest), splits.get("val"))


def cached(
    key: str,
    digest: str | None,
    cache: Path,
    source: Callable[[], Source],
    resident_bytes: int = RESIDENT_BYTES,
    on_wait: Callable[[], None] | None = None,
) -> Data:
    """Return the data set under `key`, decoded from `source` if it is not in the cache."""
    folder = cache / key
    filled(folder, lambda unfinished: _decode_into(unfinished, digest, source()), on_wait)
    facts, labels = read_labels(folder)
    splits = {split: _images(folder, split, of, resident_bytes) for split, of in labels.items()}
    return Data(splits["train"], splits["test"], tuple(facts.class_names), facts, splits.get("val"))


@contextmanager
def alone(lock: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an advisory lock. The system releases it when the process ends. `on_wait` is called from time to time while
    another process holds it."""
    with lock.open("w") as file:
        while on_wait is not None and not _locked(file):
            on_wait()
            time.sleep(LOCK_POLL_S)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def filled(folder: Path, fill: Callable[[Path], None], on_wait: Callable[[], None] | None = None) -> None:
    """Make an entry of the cache, unless it exists: `fill` writes into another folder, which is then renamed. `on_wait`
    is called from time to time while another process makes it."""
    cache = folder.parent
    with disk_full_as_storage_full(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with alone(lock_of(folder), on_wait):
            if not folder.exists():
                unfinished = partial_of(folder)
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                fill(unfinished)
                for path in [*unfinished.iterdir(), unfinished]:
                    sync(path)
                unfinished.rename(folder)
                sync(cache)
            # Under the lock, because the trimming of the cache deletes entries by the time of their last use.
            os.utime(folder)


def _decode_into(folder: Path, digest: str | None, source: Source) -> None:
    pixels = {split: _mapped(_pixels(folder, split), source.shape(split)) for split in source.present}
    sums = decode(source, pixels)
    for split in source.present:
        pixels[split].flush()
    write_labels(folder, source, source.facts(sums, digest))


def write_labels(folder: Path, source: Source, facts: DatasetFacts) -> None:
    """Write facts and labels into an entry of the cache."""
    for split in source.present:
        np.save(_labels(folder, split), source.labels[split])
    (folder / _FACTS).write_text(facts.model_dump_json())


def read_labels(folder: Path) -> tuple[DatasetFacts, dict[Split, Labels]]:
    """Return the facts and labels of an entry of the cache."""
    facts = DatasetFacts.model_validate_json((folder / _FACTS).read_bytes())
    return facts, {split: np.load(_labels(folder, split)) for split in SPLITS if _labels(folder, split).exists()}


def _mapped(path: Path, shape: tuple[int, int, int, int]) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
    """Make an array on disk with allocated blocks, because a write to a map on a full disk would kill the process."""
    array = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


OnProgress = Callable[[int, int], None]
"""Gets the number of decoded images and that of all, after every few hundred."""


def decode(source: Source, pixels: Mapping[Split, Pixels] | None = None, on_progress: OnProgress | None = None) -> Sums:
    """Decode every image in one pass, into `pixels` if they are given; return the sums of the training split.

    Raises DatasetUnreadable if all labelled training images are the same.
    """
    sums = Sums(source.channels)
    done, total = 0, sum(map(len, source.labels.values()))
    for split, rows, piece in source.pieces():
        if pixels is not None:
            pixels[split][rows] = piece
        if split == "train" and len(piece):
            sums.add(piece)
        done += len(piece)
        if on_progress is not None:
            on_progress(done, total)
    if source.class_names and sums.all_equal:
        raise DatasetUnreadable(
            f"All {sums.images:,} training images are the same picture: nothing can be learned from them.",
            "Look at the files: pictures on transparent ground, or of more than 8 bits, may have been saved empty.",
        )
    return sums


def watched(source: Source, on_progress: OnProgress) -> Source:
    """Return the same source; what it decodes is counted. Each pass begins at 0."""
    total = sum(map(len, source.labels.values()))

    def counted(pieces: Iterator[Piece]) -> Iterator[Piece]:
        done = 0
        for piece in pieces:
            yield piece
            done += len(piece.pixels)
            on_progress(done, total)

    stream = source.stream
    if stream is not None:
        each = stream.pieces
        stream = replace(stream, pieces=lambda on_encoded: counted(each(on_encoded)))
    return replace(source, pieces=lambda: counted(source.pieces()), stream=stream)


def with_options(source: Source, options: DataOptions) -> Source:
    """Return the source with its training images limited, its channels changed and its classes named."""
    source = _limited(source, options)
    if options.channels is not None and options.channels != source.channels:
        source = _with_channels(source, options.channels)
    return source if options.class_names is None else _with_class_names(source, options.class_names)


def drawn(labels: Labels, options: DataOptions) -> npt.NDArray[np.bool_]:
    """Return True for the rows that `limit` keeps: as many of each class, as far as there are so many.

    Raises DatasetUnreadable if not each class can have one.
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    if options.limit is None or options.limit >= len(labels):
        return np.ones(len(labels), dtype=np.bool_)
    if options.limit < len(classes):
        raise DatasetUnreadable(
            f"limit is {options.limit}, and there are {len(classes)} classes.",
            f"Give a limit of {len(classes)} or more: each class needs an image, and many to teach something.",
            "limit",
        )
    states = counter_rng.streams(counter_rng.key(_LIMIT, options.limit_seed or 0), torch.arange(len(labels)))
    shuffled = torch.argsort(counter_rng.draws(states, 1)[0], stable=True).numpy()
    by_class = shuffled[np.argsort(numbers[shuffled], kind="stable")]
    counts = np.bincount(numbers)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = np.zeros(len(labels), dtype=np.bool_)
    kept[by_class[np.argsort(rank, kind="stable")[: options.limit]]] = True
    return kept


def _limited(source: Source, options: DataOptions) -> Source:
    kept = drawn(source.labels["train"], options)
    if kept.all():
        return source
    places = np.cumsum(kept) - 1

    def limited(pieces: Iterator[Piece]) -> Iterator[Piece]:
        for split, rows, pixels in pieces:
            if split != "train":
                yield Piece(split, rows, pixels)
            elif (here := kept[rows]).any():
                yield Piece(split, places[rows[here]], pixels[here])

    def if_kept(on_encoded: OnEncoded, one: Encoded) -> None:
        if one.split != "train":
            on_encoded(one)
        elif kept[one.row]:
            on_encoded(one._replace(row=int(places[one.row])))

    labels = {**source.labels, "train": source.labels["train"][kept]}
    pieces, stream = source.pieces, source.stream
    if stream is not None:
        each = stream.pieces
        stream = replace(stream, pieces=lambda on_encoded: limited(each(partial(if_kept, on_encoded))))
    return replace(source, labels=labels, pieces=lambda: limited(pieces()), stream=stream)


def _with_channels(source: Source, channels: int) -> Source:
    def converted(pieces: Iterator[Piece]) -> Iterator[Piece]:
        return (Piece(split, rows, with_channels(pixels, channels)) for split, rows, pixels in pieces)

    pieces, stream = source.pieces, source.stream
    if stream is not None:
        codec, each = replace(stream.codec, converted=channels), stream.pieces
        stream = Stream(codec, lambda on_encoded: converted(each(on_encoded)))
    return replace(source, channels=channels, pieces=lambda: converted(pieces()), stream=stream)


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Return images n × C × H × W of 3 channels with 1, or the reverse."""
    return _as_grey(pixels) if channels == 1 else _as_three(pixels)


def _as_three(pixels: Pixels) -> Pixels:
    return np.repeat(pixels, 3, axis=1)


def _as_grey(pixels: Pixels) -> Pixels:
    """Return the luma of ITU-R 601-2, rounded as Pillow's mode L is."""
    red, green, blue = (pixels[:, channel].astype(np.uint32) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[:, None]


def _with_class_names(source: Source, names: Sequence[str]) -> Source:
    """Return the source with its classes in another order, or under new names. Raises DatasetUnreadable if the names
    are neither."""
    own = source.class_names
    if len(names) != len(own):
        raise DatasetUnreadable(
            f"class_names has {len(names)} names, and the data has {len(own) or 'no'} classes.",
            "Give one name for each class, in the order of the class numbers.",
            "class_names",
        )
    if set(names) == set(own):
        number = np.array([names.index(name) for name in own])
        labels = {split: number[of] for split, of in source.labels.items()}
        return replace(source, class_names=tuple(names), labels=labels)
    if shared := [name for name in names if name in own]:
        raise DatasetUnreadable(
            f"class_names has {shared[0]!r}, as the data has, but not all names of the data: "
            f"{', '.join(own[:10])}{', …' if len(own) > 10 else ''}.",
            "Give all of the data's names in another order, or only new names, in the order of the data's classes.",
            "class_names",
        )
    return replace(source, class_names=tuple(names))


def _images(folder: Path, split: Split, labels: Labels, resident_bytes: int) -> Images:
    path = _pixels(folder, split)
    # Mapped copy-on-write: torch needs writable memory, and the cached file must not change.
    pixels = np.load(path, mmap_mode="c" if path.stat().st_size > resident_bytes else None)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def _pixels(folder: Path, split: Split) -> Path:
    return folder / f"{split}_pixels.npy"


def _labels(folder: Path, split: Split) -> Path:
    return folder / f"{split}_labels.npy"
