import errno
import fcntl
import threading
from dataclasses import replace

import numpy as np
import pytest

from base.errors import DatasetUnreadable, StorageFull
from kdcore.data import decoding as cache_module
from kdcore.data.decoding import Piece, Source, Sums, alone, cached, carve, decoded, no_labels, require_all_classes


def test_sums_mean_and_std_worked_out_by_hand():
    """One channel of 0, 255, 255, 0: mean ½, deviation ½. The other is even: one grey level stands for no deviation."""
    sums = Sums(2)
    sums.add(np.array([[[[0, 255]], [[51, 51]]]], dtype=np.uint8))
    sums.add(np.array([[[[255, 0]], [[51, 51]]]], dtype=np.uint8))
    mean, std = sums.mean_and_std()
    assert mean == pytest.approx([0.5, 0.2])
    assert std == pytest.approx([0.5, 1 / 255], abs=1e-6)


def test_sums_are_exact_where_floats_are_not():
    pixels = np.full((500, 1, 100, 100), 255, dtype=np.uint8)
    pixels[0, 0, 0, 0] = 254
    sums = Sums(1)
    sums.add(pixels)
    assert sums._sum[0] == 500 * 10_000 * 255 - 1


@pytest.mark.parametrize("shape", [(7, 3, 5, 4), (300, 1, 60, 60), (2, 3, 600, 600)])
def test_sums_are_those_of_integers_in_any_memory_order(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for given in (pixels, last):
        sums = Sums(shape[1])
        sums.add(given)
        assert (sums._sum == pixels.astype(np.int64).sum(axis=(0, 2, 3))).all()
        assert (sums._squares == (pixels.astype(np.int64) ** 2).sum(axis=(0, 2, 3))).all()


def test_carve_a_tenth_is_carved():
    aside = carve(np.arange(200) % 4)
    assert aside.sum() == 20


def test_too_few_to_carve():
    with pytest.raises(DatasetUnreadable, match="3 images are too few"):
        carve(np.array([0, 1, 2]))


def test_require_all_classes_labels_that_start_at_1_are_found_out():
    with pytest.raises(DatasetUnreadable, match="No training image has label 0"):
        require_all_classes(np.array([1, 2, 1]), ("0", "1", "2"))


def test_require_all_classes_one_class_is_none():
    with pytest.raises(DatasetUnreadable, match="only one class, 'cat'"):
        require_all_classes(np.zeros(3, dtype=np.int64), ("cat",))


TRAIN = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)
TEST = TRAIN[:2] + 100


def source(failing: bool = False) -> Source:
    def pieces():
        yield Piece("train", np.array([3, 1]), TRAIN[[3, 1]])
        if failing:
            raise DatasetUnreadable("half way")
        yield Piece("test", np.array([0, 1]), TEST)
        yield Piece("train", np.array([0, 2]), TRAIN[[0, 2]])

    labels = {"train": np.array([0, 1, 0, 1]), "test": np.array([1, 0])}
    return Source("arrays", ("a", "b"), 3, 2, 2, labels, False, pieces)


def never() -> Source:
    raise AssertionError("decoded twice")


def test_decoded_rows_land_where_they_belong(tmp_path):
    for data in (decoded(source()), cached("k", "sha256:0", tmp_path, source)):
        assert (data.train.pixels.numpy() == TRAIN).all() and (data.test.pixels.numpy() == TEST).all()
        assert data.train.labels.tolist() == [0, 1, 0, 1] and data.test.labels.tolist() == [1, 0]
        assert data.class_names == ("a", "b")
        assert data.facts.mean == pytest.approx((TRAIN.mean((0, 2, 3)) / 255).tolist(), abs=1e-6)
        assert data.facts.std == pytest.approx((TRAIN.std((0, 2, 3)) / 255).tolist(), abs=1e-6)
    assert data.facts.digest == "sha256:0"


def test_decoded_and_cached_keep_a_validation_split(tmp_path):
    def three() -> Source:
        one = source()
        labels = {**one.labels, "val": np.array([1, 1, 0])}
        more = Piece("val", np.array([2, 0, 1]), TRAIN[:3])
        return replace(one, labels=labels, pieces=lambda: iter([*one.pieces(), more]), splits={"dev": 3})

    for data in (decoded(three()), *(cached("k", None, tmp_path, three, size) for size in (0, 1 << 30))):
        assert (data.val.pixels.numpy() == TRAIN[[1, 2, 0]]).all() and data.val.labels.tolist() == [1, 1, 0]
        assert data.facts.validation == 3 and data.facts.splits == {"dev": 3}
        assert data.facts.class_counts == {"train": [2, 2], "val": [1, 2], "test": [1, 1]}
        assert data.facts.mean == decoded(source()).facts.mean, "validation images do not count"
    assert decoded(source()).val is None


def test_decoded_once(tmp_path):
    first = cached("k", "sha256:0", tmp_path, source)
    again = cached("k", "sha256:0", tmp_path, never)
    assert (again.train.pixels == first.train.pixels).all() and again.facts == first.facts


def test_cached_large_splits_are_mapped_and_writing_to_them_spoils_nothing(tmp_path):
    mapped = cached("k", None, tmp_path, source, resident_bytes=0)
    assert (mapped.train.pixels.numpy() == TRAIN).all()
    mapped.train.pixels.zero_()
    assert (cached("k", None, tmp_path, never, resident_bytes=0).train.pixels.numpy() == TRAIN).all()


def test_source_images_without_labels_are_kept_and_mapped_too(tmp_path):
    pool = Source(
        kind="arrays", class_names=(), channels=3, height=2, width=2, labels=no_labels(4), test_carved=False,
        pieces=lambda: iter([Piece("train", np.arange(4), TRAIN)]),
    )  # fmt: skip
    for resident_bytes in (0, 1 << 30):
        kept = cached("k", None, tmp_path, lambda: pool, resident_bytes=resident_bytes)
        assert (kept.train.pixels.numpy() == TRAIN).all() and kept.train.labels.tolist() == [-1] * 4
        assert len(kept.test) == 0 and not kept.facts.labelled and kept.facts.num_classes == 0


def test_cached_a_data_set_that_fails_half_way_leaves_no_entry(tmp_path):
    with pytest.raises(DatasetUnreadable):
        cached("k", None, tmp_path, lambda: source(failing=True))
    assert not (tmp_path / "k").exists()
    assert len(cached("k", None, tmp_path, source).train) == 4


def test_cached_what_a_killed_job_left_is_removed(tmp_path):
    (tmp_path / "k.partial").mkdir()
    (tmp_path / "k.partial" / "train_pixels.npy").write_bytes(b"half")
    cached("k", None, tmp_path, source)
    assert not (tmp_path / "k.partial").exists()


def test_source_two_jobs_decode_once_between_them(tmp_path):
    """The second waits for the first, then finds the entry."""
    decodings = []

    def counting() -> Source:
        decodings.append(1)
        return source()

    with alone(tmp_path / "k.lock"):
        waiting = [threading.Thread(target=cached, args=("k", None, tmp_path, counting)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        assert not decodings
    for thread in waiting:
        thread.join()
    assert decodings == [1]


def test_alone_a_lock_ends_with_its_holder(tmp_path):
    with pytest.raises(KeyError), alone(tmp_path / "lock"):
        raise KeyError
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_cached_a_full_disk_is_said_to_be_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full, raising=False)
    with pytest.raises(StorageFull, match="No space left"):
        cached("k", None, tmp_path, source)
    assert not (tmp_path / "k").exists()
