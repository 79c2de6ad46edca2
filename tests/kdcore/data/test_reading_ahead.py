import os
import threading

import numpy as np
import pytest

from base.errors import DatasetUnreadable
from kdcore.data import reading_ahead
from kdcore.data.decoding import Encoded
from kdcore.data.reading_ahead import ahead, decode_ahead, free_cores


def test_free_cores_is_a_number_of_cores():
    assert free_cores() >= 1


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_ahead_keeps_the_order(count):
    assert list(ahead(range(count), lambda item: item * 2, lambda _: 1)) == [item * 2 for item in range(count)]


def test_ahead_works_in_several_threads(monkeypatch):
    monkeypatch.setattr(reading_ahead, "free_cores", lambda: 2)
    # Each of the first two batches waits for the other: one thread alone would wait for ever.
    meet = threading.Barrier(2, timeout=60)

    def work(item: int) -> int:
        if item in (0, 16):
            meet.wait()
        return item

    assert list(ahead(range(32), work, lambda _: 1)) == list(range(32))


def test_ahead_reads_no_more_than_its_bytes_before_results_are_taken(monkeypatch):
    monkeypatch.setattr(reading_ahead, "free_cores", lambda: 8)
    monkeypatch.setattr(reading_ahead, "_AHEAD_BYTES", 1000)
    taken = []
    results = ahead((taken.append(item) or item for item in range(100)), lambda item: item, lambda _: 300_000)
    assert next(results) == 0
    assert len(taken) <= 2


def test_ahead_raises_the_first_error_at_its_item():
    def work(item: int) -> int:
        if item >= 20:
            raise DatasetUnreadable(f"item {item}")
        return item

    results = ahead(range(1000), work, lambda _: 1)
    with pytest.raises(DatasetUnreadable, match="item 20"):
        list(results)


def test_ahead_closing_it_waits_for_no_work_and_begins_none():
    """Garbage collection may close it while the interpreter holds the locks that waiting for a thread would need."""
    begun, goes_on = threading.Event(), threading.Event()
    worked = []

    def work(item: int) -> int:
        if item == 16:
            begun.set()
            goes_on.wait(60)
        worked.append(item)
        return item

    results = ahead(range(1000), work, lambda _: 1)
    assert next(results) == 0
    assert begun.wait(60)
    results.close()
    assert 16 not in worked
    goes_on.set()


def test_ahead_an_error_of_the_reader_is_raised_too():
    def reader():
        yield 1
        raise DatasetUnreadable("cut short")

    with pytest.raises(DatasetUnreadable, match="cut short"):
        list(ahead(reader(), lambda item: item, lambda _: 1))


def test_decode_ahead_gives_one_piece_for_each_split_in_order():
    files = [Encoded("test" if row % 3 == 2 else "train", row, f"{row}", bytes([row % 256])) for row in range(600)]
    channels_last = np.zeros((4, 5, 3), np.uint8)
    pieces = list(decode_ahead(files, lambda one: (channels_last + one.blob[0]).transpose(2, 0, 1), 60))
    assert [piece.split for piece in pieces] == ["train", "test", "train", "test", "test", "train"]
    for split in ("train", "test"):
        rows = np.concatenate([piece.rows for piece in pieces if piece.split == split])
        pixels = np.concatenate([piece.pixels for piece in pieces if piece.split == split])
        assert rows.tolist() == [one.row for one in files if one.split == split]
        assert (pixels == (rows % 256).astype(np.uint8)[:, None, None, None]).all()
    assert all(piece.pixels.flags.c_contiguous and piece.pixels.shape[1:] == (3, 4, 5) for piece in pieces)


def test_decode_ahead_decodes_no_more_pixels_at_once_than_its_budget(monkeypatch):
    monkeypatch.setattr(reading_ahead, "free_cores", lambda: 4)
    monkeypatch.setattr(reading_ahead, "PIXELS_AT_ONCE", 100)
    monkeypatch.setattr(reading_ahead, "_BATCH", 1)
    sizes = [60, 60, 40, 40, 500, 10, 10, 90] * 8
    lock, now, most = threading.Lock(), [0], [0]

    def decode(one: Encoded) -> np.ndarray:
        with lock:
            now[0] += one.pixels
            most[0] = max(most[0], now[0] if now[0] != 500 else 0)
        os.sched_yield()
        with lock:
            now[0] -= one.pixels
        return np.zeros((1, 2, 2), np.uint8)

    files = [Encoded("train", row, f"{row}", b"x", size) for row, size in enumerate(sizes)]
    assert sum(len(piece.rows) for piece in decode_ahead(files, decode, 4)) == len(sizes)
    assert most[0] <= 100, "a picture above the budget is alone"


def test_decode_ahead_holds_no_more_decoded_pixels_than_its_bounds(monkeypatch):
    """A piece of 256 screenshots took more memory than an inspection may: it was refused as out of memory."""
    monkeypatch.setattr(reading_ahead, "free_cores", lambda: 1)
    monkeypatch.setattr(reading_ahead, "_PIECE_BYTES", 3_000)
    monkeypatch.setattr(reading_ahead, "_AHEAD_BYTES", 4_000)
    monkeypatch.setattr(reading_ahead, "_BATCH_BYTES", 1)
    made = []

    def decode(one: Encoded) -> np.ndarray:
        made.append(one.row)
        return np.full((1, 20, 50), one.row, np.uint8)

    pieces = decode_ahead((Encoded("train", row, f"{row}", b"x") for row in range(40)), decode, 1_000)
    first = next(pieces)
    assert len(made) <= 3 + 5, "of a piece, and ahead of it"
    rows = [first.rows.tolist(), *(piece.rows.tolist() for piece in pieces)]
    assert rows == [list(range(start, min(start + 3, 40))) for start in range(0, 40, 3)]


def test_decode_ahead_a_picture_larger_than_a_piece_is_one(monkeypatch):
    monkeypatch.setattr(reading_ahead, "_PIECE_BYTES", 10)
    files = [Encoded("train", row, f"{row}", b"x") for row in range(3)]
    pieces = list(decode_ahead(files, lambda one: np.zeros((1, 4, 5), np.uint8), 20))
    assert [piece.rows.tolist() for piece in pieces] == [[0], [1], [2]]
