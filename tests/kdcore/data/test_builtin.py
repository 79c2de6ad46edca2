import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from base.errors import DatasetUnreadable
from kdcore import vision
from kdcore.catalog import DATASETS, named_facts
from kdcore.data.builtin import OPENERS, open_digits, open_named
from kdcore.data.decoding import decoded
from kdcore.spec import DataOptions


def test_open_digits_counts_and_facts_are_the_catalogs():
    digits = decoded(open_digits(None))
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.facts.model_copy(update={"class_counts": {}, "largest": None}) == named_facts("digits")
    assert {s: sum(counts) for s, counts in digits.facts.class_counts.items()} == {"train": 1437, "test": 360}
    assert digits.train.pixels.shape == (1437, 1, 8, 8) and digits.train.pixels.dtype == torch.uint8


def test_open_digits_ink_is_stretched_to_bytes():
    """0 to 16 become 0 to 255: ink 8 is 127.5, rounded to even."""
    source = open_digits(None)
    values = {int(value) for piece in source.pieces() for value in np.unique(piece.pixels)}
    assert values == {round(ink * 255 / 16) for ink in range(17)}


def test_open_digits_every_digit_is_held_out_in_proportion():
    digits = decoded(open_digits(None))
    train, test = digits.train.labels.bincount(), digits.test.labels.bincount()
    assert (test / (train + test) - 360 / 1797).abs().max() < 0.003


def test_open_digits_the_split_never_changes():
    """Reports of different jobs are compared on it: the sum of the pixels held out stands for which ones they are."""
    assert int(decoded(open_digits(None)).test.pixels.sum()) == 1_784_618


def test_open_digits_another_size():
    assert decoded(open_digits(DataOptions(image_size=16))).test.pixels.shape == (360, 1, 16, 16)
    assert DATASETS["digits"].source == "bundled"


def md5(blob: bytes) -> str:
    return hashlib.md5(blob, usedforsecurity=False).hexdigest()


@pytest.fixture
def tiny_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """20 training and 10 test images; image n is even of value n, its fine label is n modulo 10."""
    root = tmp_path / "downloads" / "cifar100"
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    listed = {}
    for name, count in (("train", 20), ("test", 10)):
        pixels = np.repeat(np.arange(count, dtype=np.uint8), 3072).reshape(count, 3072)
        blob = pickle.dumps({"data": pixels, "fine_labels": [n % 10 for n in range(count)]})
        (folder / name).write_bytes(blob)
        listed[name] = [[name, md5(blob)]]
    meta = pickle.dumps({"fine_label_names": [f"class {n}" for n in range(10)]})
    (folder / "meta").write_bytes(meta)
    cifar100 = vision.torchvision().datasets.CIFAR100
    monkeypatch.setattr(cifar100, "train_list", listed["train"])
    monkeypatch.setattr(cifar100, "test_list", listed["test"])
    digest = md5(meta)
    monkeypatch.setattr(cifar100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": digest})
    return tmp_path / "downloads"


def test_open_named_a_fetched_set_is_decoded(tiny_cifar100):
    data = decoded(open_named("cifar100", None, tiny_cifar100))
    assert data.train.pixels.shape == (20, 3, 32, 32) and len(data.test) == 10
    assert data.train.pixels[:, 0, 0, 0].tolist() == list(range(20))
    assert data.train.labels.tolist() == [n % 10 for n in range(20)]
    assert data.class_names[3] == "class 3" and data.facts.kind == "named"


def test_open_named_at_another_size(tiny_cifar100):
    assert decoded(open_named("cifar100", DataOptions(image_size=16), tiny_cifar100)).test.pixels.shape == (
        10,
        3,
        16,
        16,
    )


def test_open_named_without_a_network_the_hint_is_to_upload(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(DatasetUnreadable, match="'cifar10' could not be downloaded: Name or service") as caught:
        open_named("cifar10", None, tmp_path)
    assert "upload" in str(caught.value.hint)
    assert not (tmp_path / "cifar10").exists(), "half a download is no download"


def test_open_named_every_name_in_the_catalog_has_an_opener():
    assert OPENERS.keys() == {name for name, dataset in DATASETS.items() if dataset.source == "torchvision"}
    datasets = vision.torchvision().datasets
    for opener in OPENERS.values():
        assert hasattr(datasets, opener.args[0])
