"""Data sets whose decoded pixels do not fit the cache: pictures are decoded from the file each time they are needed.

Where the pixels of a data set go is decided here, in this order:

1. into the cache, decoded once for all jobs of the host, if they fit;
2. into memory, decoded once for each attempt at a job, if they are no larger than what is loaded into memory anyway;
3. nowhere: the cache gets labels, facts and the place of every picture's bytes, and batches are decoded as they come,
   ahead of the training on all free cores. The pixels are the same, and so are views and students, bit for bit.

A picture is read from the data set's file itself where that is possible: in a .zip, in a .tar without compression, in
arrays without compression. The pictures of a compressed .tar and of tables are copied into the entry, as the files that
they are, if these fit. What is read must have the checksum that it had when the entry was made.

An entry `<key>-streamed/` of the cache has `facts.json`, and for each split `<split>_labels.npy` and
`<split>_places.npy`; `codec.json`; and `pictures`, the copied files.
"""

import json
import os
import shutil
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from base.data_cache import STREAMED
from base.errors import DatasetUnreadable
from base.warning import WarningItem
from kdcore.data import arrays, image_files
from kdcore.data.archive import Place, read_at
from kdcore.data.decoding import (
    RESIDENT_BYTES,
    Codec,
    Encoded,
    OnProgress,
    Pixels,
    Source,
    Split,
    cached,
    decode,
    decoded,
    filled,
    read_labels,
    watched,
    with_channels,
    write_labels,
)
from kdcore.data.images import Data, Images
from kdcore.data.reading_ahead import PIXELS_AT_ONCE, Budget, ahead, free_cores
from kdcore.spec import DataOptions

SETTING = "DISTILLERY_CACHE_MAX_BYTES"
_CODEC, _PICTURES = "codec.json", "pictures"
_COLUMNS = 7
"""Of a table of places: the fields of `Place`, checksum, pixels, and 1 if the bytes are in the entry's own file."""
_BATCHES_AHEAD = 1024
"""Enough that only bytes limit how far the decoding runs ahead."""

CPU = torch.device("cpu")
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Room:
    """How many bytes of decoded pixels the cache may hold (None: as many as the disk), and who hears of a data set that
    does not fit. `pointer` is its place in the spec. `on_progress` hears of the images that are decoded into it, and
    `on_wait` that another process does that."""

    max_bytes: int | None = None
    warn: Callable[[WarningItem], None] = lambda _: None
    pointer: str = "/dataset"
    on_progress: OnProgress | None = None
    on_wait: Callable[[], None] | None = None

    def watch(self, source: Source) -> Source:
        return source if self.on_progress is None else watched(source, self.on_progress)

    def bytes(self, cache: Path) -> int:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
        return free if self.max_bytes is None else min(self.max_bytes, free)

    def may_hold(self, size: int) -> bool:
        """Return True unless the setting forbids so many bytes."""
        return self.max_bytes is None or size <= self.max_bytes

    def lack(self, cache: Path, needed: int) -> tuple[str, str]:
        """Return what does not fit, in words, and what helps."""
        room = self.bytes(cache)
        is_disk = room != self.max_bytes
        has = f"its disk has {room:,} bytes free" if is_disk else f"the cache of this host may hold {room:,}"
        cure = "free disk space for the cache" if is_disk else f"set {SETTING} to {needed:,} or more"
        return f"the decoded pictures take {needed:,} bytes, and {has}", f"{cure}, or give a smaller image_size"


def kept(
    key: str,
    digest: str | None,
    cache: Path,
    open_source: Callable[[], Source],
    room: Room,
    path: Path | None = None,
    options: DataOptions = image_files.AS_IT_IS,
) -> Data:
    """Return the data set under `key`: from the cache, from memory or, if it is the file at `path`, as it is decoded.

    Raises DatasetUnreadable if it fits nowhere and its form does not allow to decode one picture alone.
    """
    streamed, source = cache / f"{key}{STREAMED}", None

    def fill(folder: Path) -> None:
        _fill(folder, digest, source or room.watch(open_source()), path, room)

    if (cache / key).exists():
        return cached(key, digest, cache, lambda: room.watch(open_source()), on_wait=room.on_wait)
    if path is not None and _decoded_bytes(streamed) > room.bytes(cache):
        return _open(streamed, path, options, fill, room)
    source = room.watch(open_source())
    if source.bytes <= room.bytes(cache):
        return cached(key, digest, cache, lambda: source, on_wait=room.on_wait)
    lack, hint = room.lack(cache, source.bytes)
    if source.bytes <= RESIDENT_BYTES:
        text = f"{lack}: each attempt at the job decodes all of them again, into memory"
        room.warn(WarningItem("decoded_again", room.pointer, text, hint))
        return decoded(source, digest)
    if path is not None and source.stream is not None:
        return _open(streamed, path, options, fill, room)
    if not room.may_hold(source.bytes):
        raise DatasetUnreadable(
            _sentence(lack, "; this form is read as a whole, not picture by picture."),
            _sentence(hint, ". Pictures in a .zip, and arrays of numpy.savez, need no room."),
        )
    # The disk is full: an error that passes, and the job waits.
    return cached(key, digest, cache, lambda: source, on_wait=room.on_wait)


def _decoded_bytes(entry: Path) -> int:
    """Return the bytes of the pixels of an entry when they are decoded; 0 if there is no such entry."""
    try:
        facts, labels = read_labels(entry)
    except FileNotFoundError:
        return 0
    height, width = facts.image_size
    return sum(map(len, labels.values())) * facts.channels * height * width


def _fill(folder: Path, digest: str | None, source: Source, path: Path | None, room: Room) -> None:
    """Decode every picture once, for the facts, and note where each is."""
    stream = source.stream
    assert stream is not None and path is not None, "only such a source is streamed"
    places = {split: np.zeros((len(of), _COLUMNS), dtype=np.int64) for split, of in source.labels.items()}
    began, descriptor = time.monotonic(), os.open(path, os.O_RDONLY)
    try:
        with (folder / _PICTURES).open("wb") as pictures:

            def note(one: Encoded) -> None:
                place, is_copy = one.place, False
                if place is None or read_at(descriptor, place) != one.blob:
                    place, is_copy = Place(pictures.tell(), len(one.blob), len(one.blob)), True
                    if not room.may_hold(place.start + place.size):
                        raise _no_room_for_files(folder.parent, source.bytes, room)
                    pictures.write(one.blob)
                places[one.split][one.row] = (*place, zlib.crc32(one.blob), one.pixels, is_copy)

            sums = decode(replace(source, pieces=lambda: stream.pieces(note)))
    finally:
        os.close(descriptor)
    for split, of in places.items():
        np.save(_places(folder, split), of)
    cost = {"seconds": time.monotonic() - began, "cores": free_cores()}
    (folder / _CODEC).write_text(json.dumps({"codec": asdict(stream.codec), **cost}))
    write_labels(folder, source, source.facts(sums, digest))


def _no_room_for_files(cache: Path, needed: int, room: Room) -> DatasetUnreadable:
    lack, hint = room.lack(cache, needed)
    return DatasetUnreadable(
        _sentence(lack, ", which is too little even for the pictures as files."),
        _sentence(hint, "; or pack the pictures as a .zip or a .tar without compression, which is read in place."),
    )


def _sentence(start: str, end: str) -> str:
    return start[0].upper() + start[1:] + end


def _open(entry: Path, path: Path, options: DataOptions, fill: Callable[[Path], None], room: Room) -> Data:
    filled(entry, fill, room.on_wait)
    facts, labels = read_labels(entry)
    about = json.loads((entry / _CODEC).read_text())
    codec = Codec(**about["codec"])
    codec = replace(codec, array=None if codec.array is None else tuple(codec.array))
    reader = Reader(path, entry / _PICTURES, codec, options)
    shape = (facts.channels, *facts.image_size)
    splits = {
        split: Images(Streamed(reader, np.load(_places(entry, split)), shape), torch.from_numpy(of))
        for split, of in labels.items()
    }
    lack, hint = room.lack(entry.parent, _decoded_bytes(entry))
    seconds = about["seconds"] * facts.train / max(1, sum(map(len, labels.values())))
    cores = f"{about['cores']} core{'s' if about['cores'] > 1 else ''}"
    text = (
        f"{lack}: each epoch decodes {facts.train:,} pictures again, which took {seconds:.0f} s on {cores} of this host"
    )
    room.warn(WarningItem("decoded_again", room.pointer, text, hint))
    return Data(splits["train"], splits["test"], tuple(facts.class_names), facts, splits.get("val"))


def _places(entry: Path, split: Split) -> Path:
    return entry / f"{split}_places.npy"


class Reader:
    """Reads and decodes single pictures of a data set, also in several threads. The files stay open with it."""

    def __init__(self, path: Path, pictures: Path, codec: Codec, options: DataOptions) -> None:
        self._descriptors: list[int] = []
        for one in (path, pictures):
            self._descriptors.append(os.open(one, os.O_RDONLY))
            weakref.finalize(self, os.close, self._descriptors[-1])
        self._codec = codec
        self._options = options
        self._budget = Budget(PIXELS_AT_ONCE)

    def pixels(self, place: Sequence[int]) -> Pixels:
        """Return the picture in a row of a table of places, uint8 C × H × W."""
        *where, deflated, checksum, pixels, is_copy = place
        start, packed, size = where
        with self._budget.of(pixels):
            blob = read_at(self._descriptors[is_copy], Place(start, packed, size, bool(deflated)))
            if len(blob) != size or zlib.crc32(blob) != checksum:
                raise DatasetUnreadable(
                    f"The data set's file has changed since it was read first: the {size:,} bytes at {start:,} are "
                    "others.",
                    "Put the file back, or register the changed one as another data set.",
                )
            codec = self._codec
            if codec.array is None:
                decoded = image_files.decode(blob, f"the picture at byte {start:,}", codec.channels, self._options)
            else:
                decoded = arrays.row_pixels(blob, codec.array, self._options)
        return decoded if codec.converted is None else with_channels(decoded[None], codec.converted)[0]


class Streamed:
    """The pixels of a split, uint8 N × C × H × W, which are decoded when rows are taken. See the module.

    It has the methods of a tensor that a batch needs. Rows that were announced by `expect`, and those after a slice,
    are decoded ahead. Any thread may take rows: a teacher that runs ahead takes some beside the training.
    """

    def __init__(self, reader: Reader, places: Places, image: tuple[int, ...], device: torch.device = CPU) -> None:
        self.device = device
        self.shape = torch.Size([len(places), *image])
        self._reader = reader
        self._places = places
        self._expected: list[int] = []
        self._taken = 0
        self._decoded: Generator[Pixels, None, None] | None = None
        self._lock = threading.Lock()
        """Of the three above."""

    def __len__(self) -> int:
        return len(self._places)

    def to(self, device: torch.device | str) -> "Streamed":
        """Return the same rows, which are copied to another device after they are decoded."""
        return Streamed(self._reader, self._places, self.shape[1:], torch.device(device))

    def part(self, index: Tensor) -> "Streamed":
        """Return some rows as a split of its own, not decoded either."""
        return Streamed(self._reader, self._places[index.cpu().numpy()], self.shape[1:], self.device)

    def expect(self, rows: Tensor) -> None:
        """Decode these rows ahead, in this order, in place of those expected before."""
        self._expect(rows.tolist())

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self._take(index.tolist())

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(len(self))
        wanted = list(range(start, stop, step))
        if not self._is_next(wanted):
            # An evaluation goes through a split from its start to its end.
            self._expect(list(range(start, len(self), step)))
        return self._take(wanted)

    def _expect(self, rows: list[int]) -> None:
        with self._lock:
            if self._decoded is not None:
                self._decoded.close()
            self._expected, self._taken, self._decoded = rows, 0, self._ahead(rows)

    def _is_next(self, rows: list[int]) -> bool:
        return self._decoded is not None and self._expected[self._taken : self._taken + len(rows)] == rows

    def _take(self, rows: list[int]) -> Tensor:
        batch = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8)
        with self._lock:
            is_next = self._is_next(rows)
            if self._decoded is not None and is_next:
                self._taken += len(rows)
                _fill_rows(batch, self._decoded)
        if not is_next:
            _fill_rows(batch, self._ahead(rows))
        return batch.to(self.device)

    def _ahead(self, rows: list[int]) -> Generator[Pixels, None, None]:
        image_bytes = self.shape[1:].numel()
        return ahead(
            rows, lambda row: self._reader.pixels(self._places[row].tolist()), lambda _: image_bytes, _BATCHES_AHEAD
        )


def _fill_rows(batch: Tensor, results: Generator[Pixels, None, None]) -> None:
    for one, pixels in zip(batch.numpy(), islice(results, len(batch)), strict=True):
        one[...] = pixels
