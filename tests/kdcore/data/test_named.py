"""torchvision's sets without a network: tiny files in CIFAR's own format, under their own checksums."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from base.errors import DatasetUnreadable
from kdcore import vision
from kdcore.catalog import DATASETS
from kdcore.data.cache import decoded
from kdcore.data.named import OPENERS, open_named


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


def test_a_fetched_set_is_decoded(tiny_cifar100):
    data = decoded(open_named("cifar100", None, tiny_cifar100))
    assert data.train.pixels.shape == (20, 3, 32, 32) and len(data.test) == 10
    assert data.train.pixels[:, 0, 0, 0].tolist() == list(range(20))
    assert data.train.labels.tolist() == [n % 10 for n in range(20)]
    assert data.class_names[3] == "class 3" and data.facts.kind == "named"


def test_at_another_size(tiny_cifar100):
    assert decoded(open_named("cifar100", 16, tiny_cifar100)).test.pixels.shape == (10, 3, 16, 16)


def test_without_a_network_the_hint_is_to_upload(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(DatasetUnreadable, match="'cifar10' could not be fetched: Name or service") as caught:
        open_named("cifar10", None, tmp_path)
    assert "upload" in str(caught.value.hint)
    assert not (tmp_path / "cifar10").exists(), "half a download is no download"


def test_every_name_in_the_catalog_has_an_opener():
    assert OPENERS.keys() == {name for name, dataset in DATASETS.items() if dataset.source == "torchvision"}
    datasets = vision.torchvision().datasets
    for opener in OPENERS.values():
        assert hasattr(datasets, opener.args[0])
