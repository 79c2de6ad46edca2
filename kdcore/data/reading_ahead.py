"""Work on files that are read one after the other, on all free cores and in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from kdcore.data.decoding import Piece, Pixels, Split

_CHUNK = 256
_AHEAD_BYTES = 64 << 20
"""The most encoded bytes that wait for a core. One file more is always read."""
T = TypeVar("T")
R = TypeVar("R")


class Encoded(NamedTuple):
    """A picture's file, its name, and the row of a split that it fills."""

    split: Split
    row: int
    name: str
    blob: bytes


def free_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(items: Iterable[T], work: Callable[[T], R], size: Callable[[T], int]) -> Iterator[tuple[T, R]]:
    """Yield each item with its result, in order. Items are read while others are worked on, up to a number of bytes.

    Pillow releases Python's lock while it decodes. The first error is raised at its item.
    """
    cores = free_cores()
    waiting: deque[tuple[T, Future[R]]] = deque()
    held = 0
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                held += size(item)
                while waiting and (held > _AHEAD_BYTES or len(waiting) > 16 * cores):
                    done, result = waiting.popleft()
                    held -= size(done)
                    yield done, result.result()
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def decode_ahead(files: Iterable[Encoded], decode: Callable[[Encoded], Pixels]) -> Iterator[Piece]:
    """Decode pictures in the order in which they come; one piece for each split among a few hundred of them."""
    decoded = ((one.split, one.row, pixels) for one, pixels in ahead(files, decode, lambda one: len(one.blob)))
    while chunk := list(islice(decoded, _CHUNK)):
        for split in dict.fromkeys(split for split, *_ in chunk):
            of = [(row, pixels) for its, row, pixels in chunk if its == split]
            yield Piece(split, np.array([row for row, _ in of], dtype=np.int64), np.stack([pixels for _, pixels in of]))
