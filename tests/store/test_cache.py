import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from store import cache
from store.cache import trim


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    return tmp_path / "cache"


def entry(folder: Path, name: str, size: int, hours_ago: float) -> Path:
    """As the engine leaves it: a folder, marked when it was used, and a lock file beside it."""
    made = folder / name
    made.mkdir()
    (made / "train_pixels.npy").write_bytes(bytes(size))
    folder.joinpath(f"{name.removesuffix('.partial')}.lock").touch()
    used_at = time.time() - hours_ago * 3600
    os.utime(made, (used_at, used_at))
    return made


@contextmanager
def held(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gone(folder: Path, max_bytes: int, dry_run: bool = False) -> list[str]:
    return [entry.folder.name for entry in trim(folder, max_bytes, dry_run)]


def test_the_longest_unused_goes_until_the_rest_fits(folder: Path):
    for number, hours_ago in enumerate([2, 4, 3, 5]):
        entry(folder, f"set{number}-native-v1", 100, hours_ago)
    assert gone(folder, 400) == []
    assert gone(folder, 250, dry_run=True) == ["set3-native-v1", "set1-native-v1"]
    assert gone(folder, 250) == ["set3-native-v1", "set1-native-v1"]
    assert sorted(path.name for path in folder.glob("*-v1")) == ["set0-native-v1", "set2-native-v1"]


def test_what_was_used_a_moment_ago_stays_however_little_room_there_is(folder: Path):
    used = entry(folder, "used-native-v1", 100, hours_ago=0.9)
    assert gone(folder, 0) == []
    assert used.exists()


def test_what_somebody_decodes_or_finds_stays(folder: Path):
    decoded = entry(folder, "found-native-v1", 100, hours_ago=5)
    half = entry(folder, "new-native-v1.partial", 100, hours_ago=5)
    with held(folder / "found-native-v1.lock"), held(folder / "new-native-v1.lock"):
        assert gone(folder, 0) == []
        assert decoded.exists() and half.exists()
    assert gone(folder, 0) == ["new-native-v1.partial", "found-native-v1"]


def test_what_a_killed_engine_left_half_done_goes_although_there_is_room(folder: Path):
    entry(folder, "new-native-v1.partial", 100, hours_ago=0)
    entry(folder / "downloads", "food101.partial", 100, hours_ago=0)
    entry(folder, "whole-native-v1", 100, hours_ago=9)
    assert set(gone(folder, 1000)) == {"new-native-v1.partial", "food101.partial"}


def test_a_download_stays_while_it_is_decoded_to_any_size(folder: Path):
    entry(folder / "downloads", "food101", 100, hours_ago=9)
    with held(folder / "food101-64-v1.lock"):
        assert gone(folder, 0) == []
    with held(folder / "food10-64-v1.lock"):
        assert gone(folder, 0) == ["food101"]


def test_locks_stay_or_two_might_hold_one(folder: Path):
    entry(folder, "set-native-v1", 100, hours_ago=9)
    assert gone(folder, 0) == ["set-native-v1"]
    assert {path.name for path in folder.iterdir()} == {"downloads", "set-native-v1.lock"}


def test_one_that_was_killed_half_way_is_not_taken_for_whole(folder: Path, monkeypatch: pytest.MonkeyPatch):
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
    assert gone(folder, 1000) == ["set-native-v1.partial"]


def test_a_cache_that_is_not_there_holds_nothing(tmp_path: Path):
    assert trim(tmp_path / "cache", 0) == []


def test_an_engine_reads_what_it_has_found_and_goes_on_with_what_it_has_mapped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Trimmed at the worst moments: when the engine has let go of the lock, and when it has opened its files."""
    from kdcore.data import decoding as of_the_engine
    from kdcore.data.decoding import Piece, Source

    pixels, labels = np.arange(288, dtype=np.uint8).reshape(6, 3, 4, 4), np.array([0, 1, 0, 1, 0, 1])
    decoded, alone, trimmed = [], of_the_engine.alone, []

    def pieces() -> Iterator[Piece]:
        decoded.append("set-v1")
        yield Piece("train", np.arange(6), pixels)
        yield Piece("test", np.arange(6), pixels)

    def source() -> Source:
        return Source("arrays", ("a", "b"), 3, 4, 4, {"train": labels, "test": labels}, False, pieces)

    @contextmanager
    def then_trimmed(lock: Path) -> Iterator[None]:
        with alone(lock):
            yield
        trimmed.append(gone(folder, 0))

    of_the_engine.cached("set-v1", None, folder, source)
    os.utime(folder / "set-v1", (0, 0))
    monkeypatch.setattr(of_the_engine, "alone", then_trimmed)
    data = of_the_engine.cached("set-v1", None, folder, source, resident_bytes=0)
    assert (trimmed, decoded) == ([[]], ["set-v1"])
    os.utime(folder / "set-v1", (0, 0))
    assert gone(folder, 0) == ["set-v1"]
    assert np.array_equal(data.train.pixels.numpy(), pixels)
