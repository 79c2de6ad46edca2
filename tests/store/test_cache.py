import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from base.data_cache import cache_of
from store import cache
from store.cache import trim


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    return tmp_path / "cache"


def entry(folder: Path, name: str, size: int, hours_ago: float) -> Path:
    """Make an entry as the engine does: a folder whose mtime is its last use, and its lock file."""
    path = folder / name
    path.mkdir()
    (path / "train_pixels.npy").write_bytes(bytes(size))
    folder.joinpath(f"{name.removesuffix('.partial')}.lock").touch()
    used_at = time.time() - hours_ago * 3600
    os.utime(path, (used_at, used_at))
    return path


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def trimmed(folder: Path, max_bytes: int, dry_run: bool = False) -> list[str]:
    return [entry.folder.name for entry in trim(folder, max_bytes, dry_run)]


def test_trim_deletes_the_least_recently_used_until_the_rest_fits(folder: Path):
    for number, hours_ago in enumerate([2, 4, 3, 5]):
        entry(folder, f"set{number}-native-v1", 100, hours_ago)
    assert trimmed(folder, 400) == []
    assert trimmed(folder, 250, dry_run=True) == ["set3-native-v1", "set1-native-v1"]
    assert trimmed(folder, 250) == ["set3-native-v1", "set1-native-v1"]
    assert sorted(path.name for path in folder.glob("*-v1")) == ["set0-native-v1", "set2-native-v1"]


def test_trim_counts_the_folders_of_all_projects(folder: Path):
    """`default` has the host's folder itself, as before there were projects."""
    assert cache_of(folder, "default") == folder
    vision = cache_of(folder, "vision")
    (vision / "downloads").mkdir(parents=True)
    entry(folder, "ours-native-v1", 100, hours_ago=3)
    entry(vision, "theirs-native-v1", 100, hours_ago=4)
    entry(vision / "downloads", "theirs", 100, hours_ago=2)
    assert trimmed(folder, 300) == []
    assert trimmed(folder, 100) == ["theirs-native-v1", "ours-native-v1"]
    assert (vision / "downloads" / "theirs").exists()


def test_trim_spares_what_was_used_lately(folder: Path):
    used = entry(folder, "used-native-v1", 100, hours_ago=0.9)
    assert trimmed(folder, 0) == []
    assert used.exists()


def test_trim_spares_a_locked_entry(folder: Path):
    decoded = entry(folder, "found-native-v1", 100, hours_ago=5)
    half = entry(folder, "new-native-v1.partial", 100, hours_ago=5)
    with locked(folder / "found-native-v1.lock"), locked(folder / "new-native-v1.lock"):
        assert trimmed(folder, 0) == []
        assert decoded.exists() and half.exists()
    assert trimmed(folder, 0) == ["new-native-v1.partial", "found-native-v1"]


def test_trim_deletes_unfinished_entries_of_any_age(folder: Path):
    entry(folder, "new-native-v1.partial", 100, hours_ago=0)
    entry(folder / "downloads", "food101.partial", 100, hours_ago=0)
    entry(folder, "whole-native-v1", 100, hours_ago=9)
    assert set(trimmed(folder, 1000)) == {"new-native-v1.partial", "food101.partial"}


def test_trim_spares_a_download_while_it_is_decoded_to_any_size(folder: Path):
    entry(folder / "downloads", "food101", 100, hours_ago=9)
    with locked(folder / "food101-64-v1.lock"):
        assert trimmed(folder, 0) == []
    with locked(folder / "food10-64-v1.lock"):
        assert trimmed(folder, 0) == ["food101"]


def test_trim_keeps_lock_files(folder: Path):
    entry(folder, "set-native-v1", 100, hours_ago=9)
    assert trimmed(folder, 0) == ["set-native-v1"]
    assert {path.name for path in folder.iterdir()} == {"downloads", "set-native-v1.lock"}


def test_trim_killed_half_way_leaves_a_partial_entry(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = entry(folder, "set-native-v1", 100, hours_ago=9)

    class Killed(BaseException):
        pass

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            (path / "train_pixels.npy").unlink()
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(cache.shutil, "rmtree", killed)
        trim(folder, 0)
    assert not whole.exists()
    assert trimmed(folder, 1000) == ["set-native-v1.partial"]


def test_trim_without_a_cache(tmp_path: Path):
    assert trim(tmp_path / "cache", 0) == []


def test_trim_while_an_engine_reads_an_entry(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """At the worst moments: after the engine has released the lock, and after it has opened its files."""
    from kdcore.data import decoding as engine_cache
    from kdcore.data.decoding import Piece, Source

    pixels, labels = np.arange(288, dtype=np.uint8).reshape(6, 3, 4, 4), np.array([0, 1, 0, 1, 0, 1])
    decoded, alone, deleted = [], engine_cache.alone, []

    def pieces() -> Iterator[Piece]:
        decoded.append("set-v1")
        yield Piece("train", np.arange(6), pixels)
        yield Piece("test", np.arange(6), pixels)

    def source() -> Source:
        return Source("arrays", ("a", "b"), 3, 4, 4, {"train": labels, "test": labels}, False, pieces)

    @contextmanager
    def alone_then_trim(lock: Path, on_wait: object = None) -> Iterator[None]:
        with alone(lock):
            yield
        deleted.append(trimmed(folder, 0))

    engine_cache.cached("set-v1", None, folder, source)
    os.utime(folder / "set-v1", (0, 0))
    monkeypatch.setattr(engine_cache, "alone", alone_then_trim)
    data = engine_cache.cached("set-v1", None, folder, source, resident_bytes=0)
    assert (deleted, decoded) == ([[]], ["set-v1"])
    os.utime(folder / "set-v1", (0, 0))
    assert trimmed(folder, 0) == ["set-v1"]
    assert np.array_equal(data.train.pixels.numpy(), pixels)
