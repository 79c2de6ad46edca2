import errno
import fcntl
import threading
from dataclasses import replace

import numpy as np
import pytest

from base.errors import DatasetUnreadable, StorageFull
from kdcore.data import decoding as cache_module
from kdcore.data.decoding import (
    Piece,
    Source,
    Sums,
    alone,
    cached,
    carve,
    decode,
    decoded,
    drawn,
    no_labels,
    require_all_classes,
    with_options,
)
from kdcore.spec import DataOptions


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


def test_cached_says_that_it_waits_for_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "LOCK_POLL_S", 0.01)
    waited = threading.Event()
    with alone(tmp_path / "k.lock"):
        thread = threading.Thread(target=cached, args=("k", None, tmp_path, source), kwargs={"on_wait": waited.set})
        thread.start()
        assert waited.wait(60)
        assert not (tmp_path / "k").exists()
    thread.join()
    assert (tmp_path / "k").exists()


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


def options(**given) -> DataOptions:
    return DataOptions.model_validate(given)


def test_sums_grey_and_all_equal():
    def after(*pieces):
        sums = Sums(3)
        for piece in pieces:
            sums.add(np.array(piece, dtype=np.uint8).reshape(-1, 3, 1, 1))
        return sums.grey, sums.all_equal

    assert after([5, 5, 5], [5, 5, 5]) == (True, True)
    assert after([5, 5, 5], [6, 6, 6]) == (True, False)
    assert after([[5, 5, 5], [5, 6, 5]]) == (False, False)
    assert after([5, 6, 5], [5, 6, 5]) == (False, True)


def same(labelled: bool, value: int = 0) -> Source:
    labels = {"train": np.array([0, 1]), "test": np.array([0])} if labelled else no_labels(2)
    names = ("a", "b") if labelled else ()
    pixels = np.full((2, 1, 2, 2), value, np.uint8)
    return Source("arrays", names, 1, 2, 2, labels, False, lambda: iter([Piece("train", np.arange(2), pixels)]))


@pytest.mark.parametrize("value", [0, 255, 7])
def test_decode_all_equal_pictures_teach_nothing(value, tmp_path):
    with pytest.raises(DatasetUnreadable, match="All 2 training images are the same picture"):
        decode(same(True, value))
    with pytest.raises(DatasetUnreadable, match="the same picture"):
        cached("k", None, tmp_path, lambda: same(True, value))
    assert decode(same(False, value)).images == 2, "images to distil onto may be few"


def test_source_facts_count_each_class_in_each_split():
    assert decoded(source()).facts.class_counts == {"train": [2, 2], "test": [1, 1]}


def test_drawn_is_even_over_classes_of_unequal_size():
    """Of 6, 3 and 1 images, 6: one of the smallest, then as many of each as are left."""
    labels = np.array([0, 1, 0, 0, 2, 1, 0, 0, 1, 0])
    counts = {limit: np.bincount(labels[drawn(labels, options(limit=limit))]).tolist() for limit in (3, 4, 6, 8, 9)}
    assert counts == {3: [1, 1, 1], 4: [2, 1, 1], 6: [3, 2, 1], 8: [4, 3, 1], 9: [5, 3, 1]}
    assert drawn(labels, options(limit=10)).all() and drawn(labels, options()).all()


def test_drawn_depends_on_the_seed_only():
    labels = np.arange(1000) % 10
    first, again, other = (drawn(labels, options(limit=100, limit_seed=seed)) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any() and first.sum() == other.sum() == 100
    assert (drawn(labels, options(limit=100)) == first).all()
    assert (drawn(labels, options(limit=100)) <= drawn(labels, options(limit=200))).all(), "more is a superset"


def test_drawn_of_unlabelled_images_is_a_plain_draw():
    assert drawn(np.full(20, -1), options(limit=5)).sum() == 5


def test_drawn_needs_an_image_for_each_class():
    with pytest.raises(DatasetUnreadable, match="limit is 2, and there are 3 classes") as caught:
        drawn(np.array([0, 1, 2, 0]), options(limit=2))
    assert caught.value.option == "limit"


def test_with_options_limits_the_training_images_only():
    """The rows that are kept are in their order, whatever the order of the pieces."""
    kept = drawn(source().labels["train"], options(limit=2))
    limited = decoded(with_options(source(), options(limit=2)))
    assert (limited.train.pixels.numpy() == TRAIN[kept]).all() and sorted(limited.train.labels.tolist()) == [0, 1]
    assert (limited.test.pixels.numpy() == TEST).all()
    assert limited.facts.train == 2 and limited.facts.class_counts["train"] == [1, 1]


def test_with_options_grey_to_three_equal_channels_and_back():
    grey = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
    labels = {"train": np.array([0, 1]), "test": np.array([], dtype=np.int64)}
    given = Source("arrays", ("a", "b"), 1, 2, 2, labels, False, lambda: iter([Piece("train", np.arange(2), grey)]))
    three = with_options(given, options(channels=3))
    colour = decoded(three)
    assert (colour.train.pixels.numpy() == grey.repeat(3, 1)).all() and colour.facts.grey
    assert colour.facts == decoded(given).facts.with_three_channels()
    assert (decoded(with_options(three, options(channels=1))).train.pixels.numpy() == grey).all()
    assert with_options(given, options(channels=1)) is given


def test_with_options_colour_to_grey_is_pillows():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 40, 50), dtype=np.uint8)
    labels = no_labels(1)
    given = Source("arrays", (), 3, 40, 50, labels, False, lambda: iter([Piece("train", np.arange(1), pixels)]))
    grey = decoded(with_options(given, options(channels=1))).train.pixels.numpy()
    assert (grey[0, 0] == np.asarray(Image.fromarray(pixels[0].transpose(1, 2, 0)).convert("L"))).all()


def test_with_options_class_names_in_another_order_renumber_the_labels():
    renamed = decoded(with_options(source(), options(class_names=["b", "a"])))
    assert renamed.class_names == ("b", "a")
    assert renamed.train.labels.tolist() == [1, 0, 1, 0] and renamed.test.labels.tolist() == [0, 1]


def test_with_options_new_class_names_are_in_the_order_of_the_classes():
    renamed = decoded(with_options(source(), options(class_names=["ant", "bee"])))
    assert renamed.facts.class_names == ["ant", "bee"] and renamed.train.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "b", "c"], "class_names has 3 names, and the data has 2 classes"),
        (["a", "bee"], "class_names has 'a', as the data has, but not all names of the data: a, b"),
    ],
)
def test_with_options_class_names_that_do_not_fit(names, said):
    with pytest.raises(DatasetUnreadable, match=said) as caught:
        with_options(source(), options(class_names=names))
    assert caught.value.option == "class_names"
    with pytest.raises(DatasetUnreadable, match="has no classes"):
        with_options(same(labelled=False), options(class_names=["a", "b"]))
