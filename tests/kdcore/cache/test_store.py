import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest

from base.data_cache import TEACHER, lock_of
from kdcore.cache import store as view_store
from kdcore.cache.store import NoRoom, ViewStore, size_of

SIZE = 6


OPENED: list[ViewStore] = []


@pytest.fixture(autouse=True)
def stores(monkeypatch):
    """Any disk is large enough, and what a test opens is closed after it."""
    monkeypatch.setattr(view_store, "MIN_FREE_BYTES", 0)
    yield
    while OPENED:
        OPENED.pop().close()


def entry(tmp_path, name="a"):
    return tmp_path / f"{name}{TEACHER}"


def opened(tmp_path, name="a", max_bytes=1 << 30, size=SIZE):
    OPENED.append(ViewStore(entry(tmp_path, name), size, max_bytes))
    return OPENED[-1]


def records(keys):
    """A record of each key, which says the key."""
    return np.repeat(np.asarray(keys, dtype=np.uint8)[:, None], SIZE, axis=1)


def put(store, *keys):
    store.add(np.asarray(keys, dtype=np.int64), records(keys))
    store.flush()
    store.refresh()


def held(store, *keys):
    """Those of the keys that are stored; what is stored must be their record."""
    places = store.find(np.asarray(keys, dtype=np.int64))
    found = [key for key, place in zip(keys, places, strict=True) if place >= 0]
    assert np.array_equal(store.read(places[places >= 0]), records(found))
    return found


def test_view_store_finds_what_was_added_and_nothing_else(tmp_path):
    store = opened(tmp_path)
    assert held(store, 1, 2) == []
    put(store, 9, 3, 5)
    put(store, 4, 3)
    assert held(store, 5, 1, 3, 4, 10, 9) == [5, 3, 4, 9] and len(store) == 4
    store.close()
    assert held(opened(tmp_path), 3, 4, 5, 6, 9) == [3, 4, 5, 9]


def test_view_store_writes_a_block_when_enough_was_added(tmp_path, monkeypatch):
    monkeypatch.setattr(view_store, "_FLUSH_BYTES", 2 * (8 + SIZE))
    store = opened(tmp_path)
    store.add(np.array([1]), records([1]))
    assert store.written == 0
    store.add(np.array([2]), records([2]))
    assert store.written == 2
    store.add(np.array([3]), records([3]))
    store.close()  # Without a flush, the third is dropped.
    assert held(opened(tmp_path), 1, 2, 3) == [1, 2]


def test_two_view_stores_find_what_the_other_has_stored_after_a_refresh(tmp_path):
    one, other = opened(tmp_path), opened(tmp_path)
    put(one, 1)
    put(other, 2, 1)
    assert held(one, 1, 2) == [1] and held(other, 1, 2) == [1, 2]
    one.refresh()
    assert held(one, 1, 2) == [1, 2] and len(one) == 2


def _fill(folder, keys):
    store = ViewStore(folder, SIZE, 1 << 30)
    for key in keys:
        put(store, key)
    store.close()


def test_processes_fill_a_view_store_at_once(tmp_path):
    ranges = [range(0, 100), range(50, 150), range(100, 200)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_fill, args=(entry(tmp_path), keys)) for keys in ranges]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert held(opened(tmp_path), *range(200)) == list(range(200))


WIDE, MANY = 4096, 100_000
"""Bytes of a record that a kill may cut in two, and more records than a writer stores until its kill."""


def wide_records(keys):
    """A record of each key, each of whose numbers says the key and its own place."""
    return (np.asarray(keys, dtype=np.int64)[:, None] * 1_000_003 + np.arange(WIDE // 8)).view(np.uint8)


def _fill_until_the_kill(folder, first, flushed):
    """Add 32 records after the other, and write a byte for each block that is whole. A block is written in pieces, so
    that most kills cut one in two."""
    write = ViewStore._write

    def in_pieces(self, block):
        for start in range(0, len(block), 1000):
            write(self, block[start : start + 1000])

    ViewStore._write = in_pieces  # Of this process alone.
    store = ViewStore(folder, WIDE, 1 << 30)
    for start in range(first, first + MANY, 32):
        keys = np.arange(start, start + 32)
        store.add(keys, wide_records(keys))
        store.flush()
        os.write(flushed, b".")


def test_view_store_has_only_right_records_after_its_writers_were_killed(tmp_path):
    """Two at once, at any time, beside what earlier ones have left. What was flushed is there."""
    context, draw = multiprocessing.get_context("fork"), np.random.default_rng(0)
    flushed, some = set(), np.zeros(0, dtype=np.int64)
    for _ in range(6):
        writers = []
        for first in (len(some), len(some) + 1):
            reads, writes = os.pipe()
            writer = context.Process(target=_fill_until_the_kill, args=(entry(tmp_path), first * MANY, writes))
            writer.start()
            os.close(writes)
            writers.append((writer, reads))
            some = np.append(some, first * MANY)
        for (writer, reads), first in zip(writers, some[-2:].tolist(), strict=True):
            blocks = sum(len(os.read(reads, 1)) for _ in range(draw.integers(1, 10)))
            time.sleep(draw.uniform(0, 0.002))
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
            assert writer.exitcode == -signal.SIGKILL
            blocks += len(os.read(reads, 1 << 16))
            os.close(reads)
            flushed |= set(range(first, first + 32 * blocks))
        store = opened(tmp_path, size=WIDE)
        found = (some[:, None] + np.arange(MANY)).flatten()
        found = found[store.find(found) >= 0]
        # Of each writer, one more block may be whole: that of which it could not tell.
        assert flushed <= set(found.tolist()) and len(found) == len(store) <= len(flushed) + 32 * len(some)
        assert np.array_equal(store.read(store.find(found)), wide_records(found))
        store.close()


def only_file(tmp_path):
    (path,) = entry(tmp_path).glob("*.views")
    return path


BLOCK = 24 + 2 * (8 + SIZE)
"""Bytes of a block of two records."""


@pytest.mark.parametrize("cut", [BLOCK - 1, BLOCK - SIZE, 30, 24, 10, 1])
def test_view_store_leaves_out_a_block_that_was_cut_short(cut, tmp_path):
    """As `kill -9` or a power cut leaves it; blocks before it are kept, and the next process goes on."""
    store = opened(tmp_path)
    put(store, 1, 2)
    put(store, 3, 4)
    store.close()
    path = only_file(tmp_path)
    path.write_bytes(path.read_bytes()[: BLOCK + cut])
    again = opened(tmp_path)
    assert held(again, 1, 2, 3, 4) == [1, 2]
    put(again, 3, 4)
    again.close()
    assert held(opened(tmp_path), 1, 2, 3, 4) == [1, 2, 3, 4]


def test_view_store_finds_a_block_once_its_rest_is_written(tmp_path):
    store = opened(tmp_path)
    put(store, 1, 2)
    whole = only_file(tmp_path).read_bytes()
    only_file(tmp_path).write_bytes(whole[:40])
    reader = opened(tmp_path)
    assert held(reader, 1, 2) == []
    only_file(tmp_path).write_bytes(whole)
    reader.refresh()
    assert held(reader, 1, 2) == [1, 2]


@pytest.mark.parametrize(
    ("at", "kept"), [(30, [3, 4, 5, 6]), (BLOCK - 1, [3, 4, 5, 6]), (18, [3, 4, 5, 6]), (0, []), (8, [])]
)
def test_view_store_leaves_out_a_block_with_a_changed_bit(at, kept, tmp_path):
    """In a key, a record or the checksum: that block is left out. In the head of a block: the rest of its file, too."""
    store = opened(tmp_path)
    for pair in ((1, 2), (3, 4), (5, 6)):
        put(store, *pair)
    store.close()
    path = only_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    assert held(opened(tmp_path), 1, 2, 3, 4, 5, 6) == kept


def test_view_store_leaves_out_records_of_another_size(tmp_path):
    put(opened(tmp_path), 1)
    assert len(opened(tmp_path, size=SIZE + 1)) == 0


def test_view_store_that_is_full_keeps_what_it_has(tmp_path):
    room = 2 * (24 + 8 + SIZE + 16) + 16
    store = opened(tmp_path, max_bytes=room)
    for key in range(4):
        put(store, key)
    assert store.full and store.written == 2
    assert held(store, 0, 1, 2, 3) == [0, 1]
    assert size_of(entry(tmp_path)) <= room


def test_view_store_deletes_the_entry_that_was_not_used_longest(tmp_path):
    """Never one that a process holds, and none if it would not help."""
    stores = {name: opened(tmp_path, name) for name in ("old", "newer", "held")}
    for number, (name, store) in enumerate(stores.items()):
        put(store, *range(5))
        view_store.os.utime(entry(tmp_path, name), (number, number))
    for name in ("old", "newer"):
        stores[name].close()
    size = size_of(entry(tmp_path, "old"))
    huge = opened(tmp_path, "b", max_bytes=50)
    put(huge, 1, 2, 3)
    assert huge.full and entry(tmp_path, "old").exists()
    store = opened(tmp_path, "c", max_bytes=3 * size + 30)
    put(store, 1)
    assert held(store, 1) == [1]
    names = {path.name.removesuffix(TEACHER) for path in tmp_path.glob(f"*{TEACHER}")}
    assert names == {"newer", "held", "b", "c"}
    put(store, 2, 3, 4, 5, 6, 7, 8, 9)
    assert not entry(tmp_path, "newer").exists() and entry(tmp_path, "held").exists()


def test_view_store_holds_a_lock_that_the_trimming_of_the_cache_respects(tmp_path):
    from store import cache

    store = opened(tmp_path)
    put(store, 1)
    view_store.os.utime(entry(tmp_path), (0, 0))
    assert cache.trim(tmp_path, 0) == []
    store.close()
    with lock_of(entry(tmp_path)).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert [one.folder for one in cache.trim(tmp_path, 0)] == [entry(tmp_path)]


def test_view_store_writes_nothing_more_after_an_error(tmp_path, monkeypatch):
    store = opened(tmp_path)
    put(store, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
        store.add(np.array([2]), records([2]))
        with pytest.raises(OSError, match="No space left"):
            store.flush()
    put(store, 3)
    assert held(store, 1, 2, 3) == [1]


def test_view_store_refuses_to_read_a_file_that_was_cut_off(tmp_path):
    """Memory that maps what is missing would end the process. A deleted file stays readable."""
    store = opened(tmp_path)
    put(store, 1, 2)
    (path,) = entry(tmp_path).glob("*.views")
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    with pytest.raises(OSError, match="cut off"):
        held(store, 2)
    store.refresh()
    assert len(store) == 2
    path.unlink()
    assert opened(tmp_path).find(np.array([1])).tolist() == [-1]


def test_view_store_reads_a_file_that_was_deleted(tmp_path):
    store = opened(tmp_path)
    put(store, 1, 2)
    shutil.rmtree(entry(tmp_path))
    store.refresh()
    assert held(store, 1, 2) == [1, 2]


def test_view_store_leaves_the_disk_some_room(tmp_path, monkeypatch):
    monkeypatch.setattr(view_store, "MIN_FREE_BYTES", 1 << 62)
    store = opened(tmp_path)
    store.add(np.array([2]), records([2]))
    with pytest.raises(NoRoom):
        store.flush()


def test_view_store_refuses_a_place_that_is_no_folder(tmp_path):
    entry(tmp_path).write_text("")
    with pytest.raises(OSError):
        opened(tmp_path)
