"""Work on files that are read one after the other, on all free cores and in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Condition
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from base.errors import DatasetUnreadable
from kdcore.data.decoding import Encoded, Piece, Pixels, Split
from kdcore.data.image_files import unreadable

_CHUNK = 256
_PIECE_BYTES = 128 << 20
"""The most decoded bytes of one piece, if that is not a single picture: 256 photographs of a phone take 9 GB."""
_BATCH = 16
_BATCH_BYTES = 256 << 10
_AHEAD_BYTES = 64 << 20
"""The most bytes of files, or of the pixels that they become, that wait for a core or to be taken, but for a batch."""
PIXELS_AT_ONCE = 100_000_000
"""A picture of 250 bytes may unpack to 80,000,000 pixels, of up to ten bytes while it is converted and resized."""
_MOST_CORES = 16
T = TypeVar("T")
R = TypeVar("R")


class Budget:
    """A number of pixels that are decoded at the same time. One picture is always let in, whatever its size."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait until so many more fit."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._limit)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


def free_cores() -> int:
    """Return the number of cores that this process may use, of those that one reader keeps busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_CORES)


def ahead(
    items: Iterable[T], work: Callable[[T], R], size: Callable[[T], int], batches: int | None = None
) -> Generator[R, None, None]:
    """Yield the result of each item, in order. Items are read while others are worked on, up to a number of bytes and
    of batches (two for each core).

    Threads are enough: Pillow and numpy release Python's lock while they decode and copy. The first error is raised at
    its item.
    """

    def all_of(batch: list[T]) -> list[R]:
        return [work(item) for item in batch]

    cores = free_cores()
    most = 2 * cores if batches is None else batches
    waiting: deque[tuple[int, Future[list[R]]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(cores)
    try:
        for batch, bytes_of in _batches(items, size):
            waiting.append((bytes_of, pool.submit(all_of, batch)))
            held += bytes_of
            while len(waiting) > most or (waiting and held > _AHEAD_BYTES):
                done, result = waiting.popleft()
                held -= done
                yield from result.result()
        while waiting:
            yield from waiting.popleft()[1].result()
    finally:
        # Without waiting: garbage collection may close a generator in the middle of a thread's start, whose locks a
        # wait would need.
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(items: Iterable[T], size: Callable[[T], int]) -> Iterator[tuple[list[T], int]]:
    """Yield items by a few with their bytes: handing over single small files would cost more than decoding them."""
    batch: list[T] = []
    held = 0
    for item in items:
        batch.append(item)
        held += size(item)
        if len(batch) == _BATCH or held > _BATCH_BYTES:
            yield batch, held
            batch, held = [], 0
    if batch:
        yield batch, held


class Attempt(NamedTuple, Generic[R]):
    """The result of the work on one file, or what is wrong with the file; with the split and row that it fills."""

    split: Split
    row: int
    result: R | DatasetUnreadable


def attempt_ahead(
    files: Iterable[Encoded], work: Callable[[Encoded], R], result_bytes: int = 0
) -> Iterator[Attempt[R]]:
    """Yield the result for each picture, in the order in which they come: as many at once as their pixels allow.

    `result_bytes`: the size of one result, of which no more wait than fit.
    """
    budget = Budget(PIXELS_AT_ONCE)

    def attempt(one: Encoded) -> Attempt[R]:
        with budget.of(one.pixels):
            try:
                return Attempt(one.split, one.row, work(one))
            except DatasetUnreadable as error:
                # Without the frames and causes that hold the file's bytes: many files may be broken.
                return Attempt(one.split, one.row, DatasetUnreadable(str(error), error.hint))

    return ahead(files, attempt, lambda one: max(len(one.blob), result_bytes))


def decode_ahead(files: Iterable[Encoded], decode: Callable[[Encoded], Pixels], image_bytes: int) -> Iterator[Piece]:
    """Decode pictures in the order in which they come; one piece for each split among a few hundred of them, or fewer
    if these are large. `image_bytes`: the size of one decoded picture.

    Raises DatasetUnreadable at the end: it names all files that cannot be read.
    """
    # In C order on every core; the arrays of Pillow have the channels last.
    results = attempt_ahead(files, lambda one: np.ascontiguousarray(decode(one)), image_bytes)
    count = min(_CHUNK, max(1, _PIECE_BYTES // image_bytes))
    faults: list[DatasetUnreadable] = []
    while chunk := list(islice(results, count)):
        faults += [one.result for one in chunk if isinstance(one.result, DatasetUnreadable)]
        if faults:
            continue
        for split in dict.fromkeys(one.split for one in chunk):
            of = [(one.row, one.result) for one in chunk if one.split == split]
            rows, pixels = zip(*of, strict=True)
            yield Piece(split, np.array(rows, dtype=np.int64), np.stack(pixels))
    if faults:
        raise unreadable(faults)
