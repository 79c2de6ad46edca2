"""Work on files that are read one after the other, on all free cores and in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Condition
from typing import NamedTuple, TypeVar

import numpy as np

from kdcore.data.decoding import Piece, Pixels, Split

_CHUNK = 256
_BATCH = 16
_BATCH_BYTES = 256 << 10
_AHEAD_BYTES = 64 << 20
"""The most bytes of files that wait for a core, but for one batch."""
_PIXELS_AT_ONCE = 100_000_000
"""A picture of 250 bytes may unpack to 80,000,000 pixels, of up to ten bytes while it is converted and resized."""
_MOST_CORES = 16
T = TypeVar("T")
R = TypeVar("R")


class Encoded(NamedTuple):
    """A picture's file, its name, and the row of a split that it fills."""

    split: Split
    row: int
    name: str
    blob: bytes
    pixels: int = 0
    """Height times width, from its header."""


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


def ahead(items: Iterable[T], work: Callable[[T], R], size: Callable[[T], int]) -> Iterator[R]:
    """Yield the result of each item, in order. Items are read while others are worked on, up to a number of bytes.

    Threads are enough: Pillow and numpy release Python's lock while they decode and copy. The first error is raised at
    its item.
    """

    def all_of(batch: list[T]) -> list[R]:
        return [work(item) for item in batch]

    cores = free_cores()
    waiting: deque[tuple[int, Future[list[R]]]] = deque()
    held = 0
    with ThreadPoolExecutor(cores) as pool:
        try:
            for batch, bytes_of in _batches(items, size):
                waiting.append((bytes_of, pool.submit(all_of, batch)))
                held += bytes_of
                while len(waiting) > 2 * cores or (waiting and held > _AHEAD_BYTES):
                    done, result = waiting.popleft()
                    held -= done
                    yield from result.result()
            while waiting:
                yield from waiting.popleft()[1].result()
        finally:
            for _, result in waiting:
                result.cancel()


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


def decode_ahead(files: Iterable[Encoded], decode: Callable[[Encoded], Pixels]) -> Iterator[Piece]:
    """Decode pictures in the order in which they come; one piece for each split among a few hundred of them."""

    budget = Budget(_PIXELS_AT_ONCE)

    def work(one: Encoded) -> tuple[Split, int, Pixels]:
        with budget.of(one.pixels):
            # In C order here, on every core; the arrays of Pillow have the channels last.
            return one.split, one.row, np.ascontiguousarray(decode(one))

    decoded = ahead(files, work, lambda one: len(one.blob))
    while chunk := list(islice(decoded, _CHUNK)):
        for split in dict.fromkeys(split for split, *_ in chunk):
            of = [(row, pixels) for its, row, pixels in chunk if its == split]
            yield Piece(split, np.array([row for row, _ in of], dtype=np.int64), np.stack([pixels for _, pixels in of]))
