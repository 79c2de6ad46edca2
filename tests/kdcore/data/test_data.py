"""The room's front door: `load` and `inspect`, on what tests make and on the real data where it is at hand."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcore import data
from kdcore.data import Views, inspect, load, order, split
from kdcore.errors import DatasetUnreadable
from kdcore.spec import CropFlip, Dataset
from tests.kdcore.data.making import class_folders, png

SHARED = Path(__file__).parents[4] / "shared" / "data"


def sha256(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_kinds_are_told_by_content(pack, npz, tmp_path):
    archive, arrays = pack(class_folders()), npz()
    odd_names = tmp_path / "archive.npz.bak", tmp_path / "arrays.zip"
    archive.rename(odd_names[0])
    arrays.rename(odd_names[1])
    assert inspect(odd_names[0], None).kind == "folders"
    assert inspect(odd_names[1], None).kind == "arrays"


def test_what_an_inspection_sees(pack):
    path = pack(class_folders(each=2))
    facts = inspect(path, None)
    assert facts.class_names == ["cat", "dog"] and facts.num_classes == 2
    assert (facts.train, facts.test, facts.test_carved) == (4, 4, False)
    assert facts.image_size == (4, 4) and facts.digest == sha256(path)
    assert facts.mean == pytest.approx([(10 + 11 + 200 + 201) / 4 / 255] * 3, abs=1e-6)


def test_loading_agrees_with_inspecting(pack, npz, tmp_path):
    for path in (pack(class_folders()), npz()):
        loaded = load(Dataset(source=f"file:{path}"), path, tmp_path / "cache")
        assert loaded.facts == inspect(path, None)
        assert len(loaded.train) == loaded.facts.train and len(loaded.test) == loaded.facts.test


def test_a_blobs_digest_is_taken_from_its_name(npz, tmp_path):
    path = npz()
    loaded = load(Dataset(source=f"blob:{sha256(path)}"), path, tmp_path / "cache")
    assert loaded.facts.digest == sha256(path)
    assert len(list((tmp_path / "cache").glob(f"{sha256(path)[7:]}-native-*"))) == 2, "the entry and its lock"


def test_each_size_is_an_entry_of_its_own(npz, tmp_path):
    path = npz()
    sides = [load(Dataset(source="file:x", image_size=s), path, tmp_path).train.pixels.shape[-1] for s in (None, 8, 6)]
    assert sides == [4, 8, 6]


def test_built_in_digits_need_no_file(tmp_path):
    digits = load(Dataset(source="digits"), None, tmp_path)
    train, validation = split(digits.train, 0.1, seed=0)
    assert len(train) + len(validation) == 1437
    views = Views(CropFlip(padding=1, flip=False), None, 10)
    inputs, labels = views.batch(digits.train, train[order(len(train), 0, 0)][:64], seed=0, epoch=0)
    assert inputs.shape == (64, 1, 8, 8) and labels.shape == (64,)


def test_an_unknown_name_says_which_there_are(tmp_path):
    with pytest.raises(DatasetUnreadable, match="no built-in data set 'digit'") as caught:
        load(Dataset(source="digit"), None, tmp_path)
    assert "cifar100" in str(caught.value.hint)


def test_a_broken_image_fails_the_inspection(pack):
    with pytest.raises(DatasetUnreadable, match=r"train/dog/2\.png"):
        inspect(pack(class_folders() | {"train/dog/2.png": png()[:50]}), None)


def test_neither_a_folder_nor_nothing_is_a_data_set(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DatasetUnreadable, match="is not a file"):
            inspect(path, None)


def test_pickles_are_never_read(tmp_path):
    path = tmp_path / "data.npy"
    np.save(path, np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetUnreadable):
        inspect(path, None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not at hand")
def test_real_flowers():
    facts = inspect(SHARED / "flowers128.zip", 32)
    assert facts.class_names == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    assert (facts.train, facts.test, facts.channels, facts.image_size) == (3457, 860, 3, (32, 32))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not at hand")
def test_real_cifar100(tmp_path):
    subprocess.run([sys.executable, SHARED / "unpack.py", tmp_path], check=True, stdout=subprocess.DEVNULL)
    cifar = load(Dataset(source="file:x"), tmp_path / "cifar100.npz", tmp_path / "cache")
    assert (len(cifar.train), len(cifar.test), len(cifar.class_names)) == (50_000, 10_000, 100)
    named = data.DATASETS["cifar100"]
    assert cifar.facts.mean == pytest.approx(named.mean, abs=1e-4)
    assert cifar.facts.std == pytest.approx(named.std, abs=1e-4)
