"""`load` and `inspect`, on small files made here and on the real data if it is available."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import DatasetUnreadable
from kdcore.catalog import DATASETS
from kdcore.catalog.facts import DATASET_READING
from kdcore.data import inspect, load, load_unlabelled
from kdcore.data.archive import Limits
from kdcore.data.images import split
from kdcore.data.loading import require_short_names
from kdcore.data.views import Views, order
from kdcore.spec import CropFlip, DataOptions, Dataset
from tests.kdcore.data.making import class_folders, png

SHARED = Path(__file__).parents[4] / "shared" / "data"


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_inspect_kinds_are_told_by_content(pack, npz, tmp_path):
    archive, arrays = pack(class_folders()), npz()
    odd_names = tmp_path / "archive.npz.bak", tmp_path / "arrays.zip"
    archive.rename(odd_names[0])
    arrays.rename(odd_names[1])
    assert inspect(odd_names[0], None).kind == "folders"
    assert inspect(odd_names[1], None).kind == "arrays"


def test_inspect_what_an_inspection_sees(pack):
    path = pack(class_folders(each=2))
    facts = inspect(path, None)
    assert facts.class_names == ["cat", "dog"] and facts.num_classes == 2
    assert (facts.train, facts.test, facts.test_carved) == (4, 4, False)
    assert facts.image_size == (4, 4) and facts.digest == sha256(path)
    assert facts.mean == pytest.approx([(10 + 11 + 200 + 201) / 4 / 255] * 3, abs=1e-6)


def test_load_loading_agrees_with_inspecting(pack, npz, tmp_path):
    for path in (pack(class_folders()), npz()):
        loaded = load(Dataset(source=f"file:{path}"), path, tmp_path / "cache")
        assert loaded.facts == inspect(path, None)
        assert len(loaded.train) == loaded.facts.train and len(loaded.test) == loaded.facts.test


def test_load_a_blobs_digest_is_taken_from_its_name(npz, tmp_path):
    path = npz()
    loaded = load(Dataset(source=f"blob:{sha256(path)}"), path, tmp_path / "cache")
    assert loaded.facts.digest == sha256(path)
    assert len(list((tmp_path / "cache").glob(f"{sha256(path)[7:]}-native-*"))) == 2, "the entry and its lock"


def test_load_each_size_is_an_entry_of_its_own(npz, tmp_path):
    path = npz()
    sides = [load(Dataset(source="file:x", image_size=s), path, tmp_path).train.pixels.shape[-1] for s in (None, 8, 6)]
    assert sides == [4, 8, 6]


def test_load_built_in_digits_need_no_file(tmp_path):
    digits = load(Dataset(source="digits"), None, tmp_path)
    train, validation = split(digits.train, 0.1, seed=0)
    assert len(train) + len(validation) == 1437
    views = Views(CropFlip(padding=1, flip=False), None, 10)
    batch = views.batch(digits.train, train[order(len(train), 0, 0)][:64], seed=0, epoch=0)
    assert batch.inputs.shape == (64, 1, 8, 8) and batch.labels.shape == (64,)


def test_load_an_unknown_name_says_which_there_are(tmp_path):
    with pytest.raises(DatasetUnreadable, match="no built-in data set 'digit'") as caught:
        load(Dataset(source="digit"), None, tmp_path)
    assert "cifar100" in str(caught.value.hint)


@pytest.fixture
def pool(tmp_path):
    path = tmp_path / "pool.npz"
    np.savez(path, x=np.arange(5 * 48, dtype=np.uint8).reshape(5, 4, 4, 3))
    return path


def test_inspect_an_inspection_says_that_there_are_no_labels(pool, npz):
    facts = inspect(pool, None)
    assert not facts.labelled and inspect(npz(), None).labelled
    assert (facts.num_classes, facts.class_names, facts.train, facts.test) == (0, [], 5, 0)
    assert len(facts.mean) == 3 and facts.digest == sha256(pool)


def test_load_images_without_labels_are_no_data_set_to_measure_on(pool, tmp_path):
    with pytest.raises(DatasetUnreadable, match=r"pool\.npz holds images without labels") as caught:
        load(Dataset(source=f"file:{pool}"), pool, tmp_path / "cache")
    assert "y_train" in str(caught.value.hint) and "class" in str(caught.value.hint)


def test_load_any_data_set_serves_without_its_labels(pool, npz, pack_zip, tmp_path):
    cache = tmp_path / "cache"
    like = load(Dataset(source="file:x"), npz(), cache).facts
    files = [
        (lambda: pool, 5),
        (npz, 6),
        (lambda: pack_zip(class_folders()), 6),
        (lambda: pack_zip({"1.png": png()}), 1),
    ]
    for write, count in files:
        images = load_unlabelled(Dataset(source="file:pool"), write(), cache, like)
        assert images.labels.tolist() == [-1] * count and images.pixels.shape == (count, 3, 4, 4)
    digits = load(Dataset(source="digits"), None, cache)
    named = load_unlabelled(Dataset(source="digits"), None, cache, digits.facts)
    assert torch.equal(named.pixels, digits.train.pixels) and digits.train.labels.min() == 0


@pytest.mark.parametrize(
    ("x", "said", "hint"),
    [
        (np.zeros((5, 4, 4), np.uint8), "have 1 channels, those of the data set 3", "RGB"),
        (np.zeros((5, 8, 6, 3), np.uint8), "are 6 x 8 pixels, those of the data set 4 x 4", "image_size"),
    ],
    ids=["grey", "large"],
)
def test_load_unlabelled_images_that_do_not_fit_the_data_set_are_refused(npz, tmp_path, x, said, hint):
    path = tmp_path / "pool.npz"
    np.savez(path, x=x)
    with pytest.raises(DatasetUnreadable, match=said) as caught:
        load_unlabelled(Dataset(source="file:pool"), path, tmp_path / "cache", inspect(npz(), None))
    assert hint in str(caught.value.hint)


def test_load_unlabelled_a_size_asked_for_makes_them_fit(npz, tmp_path):
    path = tmp_path / "pool.npz"
    np.savez(path, x=np.zeros((5, 8, 6, 3), np.uint8))
    dataset = Dataset(source="file:pool", image_size=4)
    assert load_unlabelled(dataset, path, tmp_path / "cache", inspect(npz(), None)).pixels.shape == (5, 3, 4, 4)


def test_load_views_of_joined_images_are_those_of_each(pool, npz, tmp_path):
    train = load(Dataset(source="file:x"), npz(), tmp_path / "cache").train
    unlabelled = load_unlabelled(Dataset(source="file:pool"), pool, tmp_path / "cache", inspect(pool, None))
    both = train.joined(unlabelled)
    index = torch.tensor([10, 2, 0, 7, 5])
    batch = Views(CropFlip(padding=1), None, 3).batch(both, index, seed=0, epoch=0)
    known = Views(CropFlip(padding=1), None, 3).batch(train, index[[1, 2, 4]], seed=0, epoch=0)
    assert batch.labels.tolist() == [-1, 2, 0, -1, 2]
    assert torch.equal(batch.inputs[[1, 2, 4]], known.inputs)


def test_inspect_a_broken_image_fails_the_inspection(pack):
    with pytest.raises(DatasetUnreadable, match=r"train/dog/2\.png"):
        inspect(pack(class_folders() | {"train/dog/2.png": png()[:50]}), None)


def test_inspect_neither_a_folder_nor_nothing_is_a_data_set(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DatasetUnreadable, match="is not a file"):
            inspect(path, None)


def test_inspect_pickles_are_never_read(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetUnreadable):
        inspect(path, None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not at hand")
def test_inspect_real_flowers():
    facts = inspect(SHARED / "flowers128.zip", DataOptions(image_size=32))
    assert facts.class_names == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    assert (facts.train, facts.test, facts.channels, facts.image_size) == (3457, 860, 3, (32, 32))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not at hand")
def test_load_real_cifar100(tmp_path):
    subprocess.run([sys.executable, SHARED / "unpack.py", tmp_path], check=True, stdout=subprocess.DEVNULL)
    cifar = load(Dataset(source="file:x"), tmp_path / "cifar100.npz", tmp_path / "cache")
    assert (len(cifar.train), len(cifar.test), len(cifar.class_names)) == (50_000, 10_000, 100)
    named = DATASETS["cifar100"]
    assert cifar.facts.mean == pytest.approx(named.mean, abs=1e-4)
    assert cifar.facts.std == pytest.approx(named.std, abs=1e-4)


def keys(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_load_defaults_that_are_written_out_are_the_same_entry_of_the_cache(npz, tmp_path):
    path, cache = npz(), tmp_path / "cache"
    for dataset in (Dataset(source="file:x"), Dataset(source="file:x").resolved()):
        load(dataset, path, cache)
    assert keys(cache) == [f"{sha256(path)[7:]}-native-v{DATASET_READING}"]
    load(Dataset(source="file:x", image_size=8), path, cache)
    assert keys(cache)[0] == f"{sha256(path)[7:]}-8-v{DATASET_READING}"


def test_load_each_reading_is_an_entry_of_its_own(pack_zip, tmp_path):
    path, cache = pack_zip(class_folders(each=20)), tmp_path / "cache"
    readings = [{}, {"channels": 1}, {"limit": 10}, {"limit": 10, "limit_seed": 1}, {"image_size": 8, "resize": "pad"}]
    loaded = [load(Dataset(source="file:x", **given), path, cache) for given in readings]
    assert len(keys(cache)) == len(readings)
    assert [len(one.train) for one in loaded] == [40, 40, 10, 10, 40]
    assert [one.train.pixels.shape[1:] for one in loaded] == [(3, 4, 4), (1, 4, 4), (3, 4, 4), (3, 4, 4), (3, 8, 8)]
    for given, one in zip(readings, loaded, strict=True):
        assert one.facts == inspect(path, DataOptions.model_validate(given))


def test_load_built_in_digits_with_three_channels_and_a_limit(tmp_path):
    plain = load(Dataset(source="digits"), None, tmp_path)
    digits = load(Dataset(source="digits", channels=3, limit=50), None, tmp_path)
    assert digits.train.pixels.shape == (50, 3, 8, 8) and digits.facts.class_counts["train"] == [5] * 10
    assert torch.equal(digits.test.pixels, plain.test.pixels.repeat(1, 3, 1, 1)) and digits.facts.grey


def test_load_unlabelled_grey_images_beside_colour_ones(npz, tmp_path):
    path = tmp_path / "pool.npz"
    np.savez(path, x=np.arange(80, dtype=np.uint8).reshape(5, 4, 4))
    dataset = Dataset(source="file:pool", channels=3)
    images = load_unlabelled(dataset, path, tmp_path / "cache", inspect(npz(), None))
    assert images.pixels.shape == (5, 3, 4, 4)


def test_inspect_names_all_broken_pictures(pack):
    broken = {f"train/dog/{number}.png": png(40, 40)[:60] for number in range(3)}
    with pytest.raises(DatasetUnreadable, match=r"3 pictures cannot be read\. train/dog/0\.png .*1\.png .*2\.png"):
        inspect(pack(class_folders(width=40, height=40) | broken))
    facts = inspect(pack(class_folders(each=9, width=40, height=40) | broken), DataOptions(skip_unreadable=True))
    assert (facts.train, facts.skipped, facts.skipped_names) == (15, 3, list(broken))
    assert facts.class_counts == {"train": [9, 6], "test": [9, 9]}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not at hand")
def test_inspect_real_flowers_with_a_limit():
    facts = inspect(SHARED / "flowers128.zip", DataOptions(image_size=32, limit=100))
    assert facts.class_counts["train"] == [20] * 5 and not facts.grey
    assert facts.pictures == {"colour": 960} and facts.pixels_cut == 0, "they are squares of 128 pixels"


@pytest.mark.parametrize(
    ("names", "limits", "text"),
    [
        (["a"] * 4, {"classes": 3}, "4 classes; the most is 3"),
        (["a", "bcd"], {"name_characters": 2}, "name of class 1 has 3 characters; the most is 2"),
        (["abc", "def"], {"names_characters": 5}, "have 6 characters; the most is 5"),
    ],
)
def test_require_short_names(names: list[str], limits: dict[str, int], text: str) -> None:
    require_short_names(["abc", "Grüße", "猫"])
    with pytest.raises(DatasetUnreadable, match=text):
        require_short_names(names, Limits(**limits))
