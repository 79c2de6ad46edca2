"""CIFAR's archives and MNIST's idx files, made here in every way that they are published or packed anew."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from base.errors import DatasetUnreadable
from kdcore.data import published
from kdcore.data.archive import Limits
from kdcore.data.decoding import decode
from kdcore.data.published import holds_cifar, holds_idx, open_cifar, open_idx, open_idx_file
from kdcore.spec import DataOptions, dataset_warnings

RNG = np.random.default_rng(0)
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE = [f"fine{number}" for number in range(100)]


def batch(images: int, classes: int = 10, seed: int = 0) -> tuple[np.ndarray, list[int]]:
    data = np.random.default_rng(seed).integers(0, 256, (images, 3072), dtype=np.uint8)
    return data, [(seed + row) % classes for row in range(images)]


def python_form(data: np.ndarray, labels: list[int], key: bytes = b"labels", protocol: int = 2, **more) -> bytes:
    names = [b"%d.png" % row for row in range(len(labels))]
    return pickle.dumps({b"data": data, key: labels, b"filenames": names, b"batch_label": b"one", **more}, protocol)


def pixels(source, split="train") -> np.ndarray:
    found = np.zeros(source.shape(split), np.uint8)
    for name, rows, piece in source.pieces():
        if name == split:
            found[rows] = piece
    return found


def packed(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, blob in members.items():
                archive.writestr(name, blob)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, blob in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    return path


def cifar10(protocol: int = 2, folder: str = "cifar-10-batches-py/") -> dict[str, bytes]:
    """Batches in the odd order of the published archive."""
    members = {f"{folder}data_batch_{n}": python_form(*batch(20, seed=n), protocol=protocol) for n in (4, 1, 2, 3, 5)}
    members[f"{folder}readme.html"] = b"<meta>"
    members[f"{folder}test_batch"] = python_form(*batch(10, seed=6), protocol=protocol)
    members[f"{folder}batches.meta"] = pickle.dumps({b"label_names": [n.encode() for n in TEN]}, protocol)
    return members


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_open_cifar_reads_every_protocol_of_the_python_form(tmp_path, protocol):
    source = open_cifar(packed(tmp_path / "c.tar.gz", cifar10(protocol)), None)
    assert source.class_names == tuple(TEN) and (source.channels, source.height, source.width) == (3, 32, 32)
    expected = [batch(20, seed=n) for n in range(1, 6)]
    assert source.labels["train"].tolist() == [label for _, labels in expected for label in labels]
    assert (pixels(source) == np.concatenate([data for data, _ in expected]).reshape(-1, 3, 32, 32)).all()
    data, labels = batch(10, seed=6)
    assert source.labels["test"].tolist() == labels and (pixels(source, "test").reshape(-1, 3072) == data).all()
    assert not source.test_carved


def test_open_cifar_reads_what_python_2_wrote(tmp_path):
    """Protocol 2 with byte strings as Python 2 has them: opcodes U and T, which Python 3 no longer writes."""
    data, labels = batch(20)

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<I", len(value)) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01M" + struct.pack("<H", 20) + b"M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") +
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89" + text(data.tobytes()) + b"tb"
    )  # fmt: skip
    blob = b"\x80\x02}q\x00(" + text(b"data") + array + text(b"labels") + b"](" + b"".join(
        b"K" + bytes([label]) for label in labels
    ) + b"eu."  # fmt: skip
    members = {f"data_batch_{n}": blob for n in (1, 2)}
    source = open_cifar(packed(tmp_path / "c.zip", members), None)
    assert source.test_carved and source.class_names == tuple(TEN)
    assert len(source.labels["train"]) == 36 and len(source.labels["test"]) == 4


def test_open_cifar_reads_the_hundred_by_their_fine_labels(tmp_path):
    data, fine = batch(200, 100)
    coarse = [label // 5 for label in fine]
    train = python_form(data, fine, b"fine_labels", coarse_labels=coarse)
    test = python_form(*batch(100, 100, seed=1), key=b"fine_labels")
    meta = pickle.dumps({b"fine_label_names": [name.encode() for name in FINE], b"coarse_label_names": []}, 2)
    members = {
        f"cifar-100-python/{n}": b for n, b in {"file.txt~": b"", "train": train, "test": test, "meta": meta}.items()
    }
    source = open_cifar(packed(tmp_path / "c.tar.gz", members), None)
    assert source.class_names == tuple(FINE) and source.labels["train"].tolist() == fine
    records = np.column_stack([np.array(coarse, np.uint8), np.array(fine, np.uint8), data])
    binary = {"train.bin": records.tobytes(), "fine_label_names.txt": ("\n".join(FINE) + "\n").encode()}
    again = open_cifar(packed(tmp_path / "b.tar", {**binary, "test.bin": records[:100].tobytes()}), None)
    assert again.class_names == source.class_names and (pixels(again) == pixels(source)).all()
    del binary["fine_label_names.txt"]
    unnamed = open_cifar(packed(tmp_path / "n.tar", {**binary, "test.bin": records[:100].tobytes()}), None)
    assert unnamed.class_names == tuple(map(str, range(100)))


@pytest.mark.parametrize("form", ["c.tar.gz", "c.tar", "c.zip"])
def test_open_cifar_reads_the_binary_form_however_it_is_packed(tmp_path, form):
    parts = {f"cifar-10-batches-bin/data_batch_{n}.bin": batch(20, seed=n) for n in (2, 1)}
    parts["cifar-10-batches-bin/test_batch.bin"] = batch(10, seed=3)
    members = {name: np.column_stack([np.array(y, np.uint8), x]).tobytes() for name, (x, y) in parts.items()}
    source = open_cifar(packed(tmp_path / form, members), DataOptions(image_size=8))
    assert source.class_names == tuple(TEN), "the catalogue's, since the archive has no list of names"
    assert source.labels["train"].tolist() == batch(20, seed=1)[1] + batch(20, seed=2)[1]
    assert pixels(source).shape == (40, 3, 8, 8)
    assert [one.what for one in source.left_out] == ["data_batch_3", "data_batch_4", "data_batch_5"]


def test_open_cifar_names_a_missing_training_batch(tmp_path):
    members = cifar10()
    assert not open_cifar(packed(tmp_path / "whole.zip", members)).left_out
    del members["cifar-10-batches-py/data_batch_3"]
    source = open_cifar(packed(tmp_path / "c.zip", members))
    assert [(one.what, one.count) for one in source.left_out] == [("data_batch_3", 0)]
    (warning,) = (one for one in dataset_warnings(source.facts(decode(source), None)) if one.code == "files_left_out")
    assert warning.message.startswith("missing: data_batch_3: the archive does not hold this part")


class Evil:
    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / 'ran'}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_open_cifar_runs_no_pickle(tmp_path, protocol):
    evil = pickle.dumps({b"data": Evil(tmp_path), b"labels": [0, 1]}, protocol)
    with pytest.raises(DatasetUnreadable, match=r"names (posix|nt)\.system, which is never imported"):
        open_cifar(packed(tmp_path / "c.zip", {"data_batch_1": evil}), None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "data_batch_1 is no pickle"),
        (b"not a pickle", "data_batch_1 is no pickle"),
        (python_form(*batch(20))[:5000], "data_batch_1 is no pickle"),
        (pickle.dumps([1, 2]), "holds a list, not a dictionary"),
        (pickle.dumps({b"labels": [0, 1]}), "'data' is no array of bytes"),
        (python_form(np.zeros((2, 3072), np.float32), [0, 1]), "another type than uint8"),
        (python_form(np.zeros((2, 100), np.uint8), [0, 1]), r"'data' is of shape \(2, 100\)"),
        (python_form(np.zeros((3, 3072), np.uint8), [0, 1]), "it is 2 x 3072 uint8"),
        (python_form(np.zeros((2, 3072), np.uint8), [0, -1]), "no list 'labels'"),
        (python_form(np.zeros((2, 3072), np.uint8), [0, 10]), "the label of image 1 is 10; there are 10 classes"),
        (b"(" * 60_000, "no pickle of plain data"),
        (b"\x80\x04" + b"]\x94" * 30_000 + b".", "more than 50,000 opcodes"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "no pickle of plain data"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "holds a list"),
    ],
    ids=range(14),
)
def test_open_cifar_refuses_damaged_and_hostile_pickles(tmp_path, monkeypatch, blob, said):
    monkeypatch.setattr(published, "_MAX_OPCODES", 50_000)
    with pytest.raises(DatasetUnreadable, match=said):
        open_cifar(packed(tmp_path / "c.zip", {"data_batch_1": blob}), None)


def test_open_cifar_refuses_or_reads_a_pickle_with_any_byte_changed(tmp_path):
    blob = bytearray(python_form(np.zeros((2, 3072), np.uint8), [0, 1]))
    places = [*range(200), *range(len(blob) - 100, len(blob))]
    for place in places:
        changed = blob.copy()
        changed[place] ^= 1 << place % 8
        try:
            published._pickled("data_batch_1", bytes(changed))
        except DatasetUnreadable as error:
            assert "data_batch_1" in str(error)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"test_batch.bin": bytes(3073)}, "no training images"),
        ({"data_batch_1.bin": bytes(3074)}, "no whole number of records of 3073"),
        ({"data_batch_1.bin": b""}, "0 bytes"),
        ({"data_batch_1.bin": bytes(3073), "train.bin": bytes(3074)}, "parts of CIFAR-10 and of CIFAR-100"),
        ({"a/data_batch_1.bin": bytes(3073), "b/data_batch_1.bin": bytes(3073)}, r"holds data_batch_1\.bin twice"),
        ({"data_batch_1.bin": bytes(3073)}, "No training image has label 1"),
        ({"train.bin": bytes(3074), "meta": pickle.dumps({b"fine_label_names": 3})}, "no list 'fine_label_names'"),
    ],
    ids=range(7),
)
def test_open_cifar_refuses_incomplete_archives(tmp_path, members, said):
    with pytest.raises(DatasetUnreadable, match=said):
        open_cifar(packed(tmp_path / "c.zip", members), None)


def test_holds_cifar_and_holds_idx_go_by_the_names():
    assert holds_cifar(["cifar-10-batches-py/data_batch_1"]) and holds_cifar(["x/train", "x/meta"])
    assert not holds_cifar(["train/cat/1.png", "test/dog/train"]) and not holds_cifar(["train"])
    assert holds_idx(["MNIST/raw/t10k-labels.idx1-ubyte"]) and holds_idx(["emnist-letters-train-images-idx3-ubyte.gz"])
    assert not holds_idx(["train-images.zip", "images/1.png"])


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def mnist(train: int = 30, test: int = 10, name: str = "{}-{}-idx{}-ubyte") -> tuple[dict[str, bytes], np.ndarray]:
    x = RNG.integers(0, 256, (train + test, 6, 5), dtype=np.uint8)
    y = np.arange(train + test, dtype=np.uint8) % 10
    members = {}
    for split, rows in (("t10k", slice(train, None)), ("train", slice(0, train))):
        if len(x[rows]):
            members[name.format(split, "images", 3)] = idx(x[rows])
            members[name.format(split, "labels", 1)] = idx(y[rows])
    return members, x


@pytest.mark.parametrize("form", ["m.zip", "m.tar", "m.tar.gz"])
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    "name", ["{}-{}-idx{}-ubyte", "MNIST/raw/{}-{}.idx{}-ubyte", "gzip/emnist-mnist-{}-{}-idx{}-ubyte"]
)
def test_open_idx_reads_the_four_files_in_one_archive(tmp_path, form, gzipped, name):
    members, x = mnist(name=name)
    if gzipped:
        members = {f"{name}.gz": gzip.compress(blob) for name, blob in members.items()}
    source = open_idx(packed(tmp_path / form, members), None)
    assert (source.channels, source.height, source.width) == (1, 6, 5) and not source.test_carved
    assert source.class_names == tuple("0123456789")
    assert source.labels["train"].tolist() == [row % 10 for row in range(30)]
    assert (pixels(source)[:, 0] == x[:30]).all() and (pixels(source, "test")[:, 0] == x[30:]).all()


def test_open_idx_sets_a_tenth_aside_without_t10k(tmp_path):
    members, x = mnist(40, 0)
    source = open_idx(packed(tmp_path / "m.zip", members), None)
    assert source.test_carved and len(source.labels["train"]) == 36 and len(source.labels["test"]) == 4
    both = np.concatenate([pixels(source), pixels(source, "test")])[:, 0]
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in x)
    for split in ("train", "test"):
        rows = [next(row for row in range(40) if (x[row] == image).all()) for image in pixels(source, split)[:, 0]]
        assert [row % 10 for row in rows] == source.labels[split].tolist()


def test_open_idx_reads_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "_CHUNK_BYTES", 100)
    members, x = mnist()
    source = open_idx(packed(tmp_path / "m.zip", members), None)
    assert len(list(source.pieces())) == 14 and (pixels(source)[:, 0] == x[:30]).all()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_open_idx_file_of_images_alone_has_no_labels(tmp_path, pack):
    x = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(pack(idx(x)))
    source = open_idx_file(path, None)
    assert source.class_names == () and source.labels["train"].tolist() == [-1] * 4
    assert (pixels(source) == x.transpose(0, 3, 1, 2)).all()
    assert pixels(open_idx_file(path, DataOptions(image_size=8))).shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (idx(np.zeros(4, np.uint8)), "holds labels; images are missing"),
        (struct.pack(">IIII", 0xD03, 4, 2, 2) + bytes(64), "type 0x0d; bytes"),
        (struct.pack(">IIII", 0x803, 4, 2, 2) + bytes(15), "cut short: its shape"),
        (struct.pack(">II", 0x803, 4), "cut short in its header"),
        (struct.pack(">IIII", 0x803, 0, 2, 2), "has shape"),
        (struct.pack(">III", 0x802, 4, 2) + bytes(8), "has shape"),
        (struct.pack(">IIII", 0x803, 2**31, 2**10, 2**10), "looks like a bomb"),
        (gzip.compress(idx(np.zeros((9, 60, 60), np.uint8)))[:-20], "cannot be unpacked|cut short"),
    ],
    ids=range(8),
)
def test_open_idx_file_refuses_what_is_wrong(tmp_path, blob, said):
    path = tmp_path / "x"
    path.write_bytes(blob)
    with pytest.raises(DatasetUnreadable, match=said):
        pixels(open_idx_file(path, None))


def test_open_idx_file_is_bounded_by_the_ratio_of_archives(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((100, 100, 100), np.uint8))))
    with pytest.raises(DatasetUnreadable, match="1,000,000 bytes from"):
        open_idx_file(path, None, Limits(ratio_from_bytes=10_000))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train-labels-idx1-ubyte": None}, "lacks the labels of train"),
        ({"t10k-images-idx3-ubyte": None}, "lacks the images of test"),
        ({"t10k-labels-idx1-ubyte": idx(np.zeros(9, np.uint8))}, "test split has 9 labels for 10 images"),
        (
            {"t10k-images-idx3-ubyte": idx(np.zeros((10, 7, 5), np.uint8))},
            r"train are \(6, 5\), those of test \(7, 5\)",
        ),
        ({"raw/train-labels-idx1-ubyte": idx(np.zeros(30, np.uint8))}, "labels of train twice"),
        ({"letters-train-labels-idx1-ubyte": idx(np.zeros(30, np.uint8))}, "several sets of idx files"),
        ({"train-labels-idx1-ubyte": idx(np.full(30, 9, np.uint8))}, "No training image has label 0"),
        ({"train-labels-idx1-ubyte": struct.pack(">II", 0x801, 2**31)}, "labels are one number an image"),
        ({"train-labels-idx1-ubyte": struct.pack(">II", 0x801, 30)}, "0 of 30 labels"),
        ({"train-labels-idx1-ubyte": b"<html>"}, "is no idx file"),
    ],
    ids=range(10),
)
def test_open_idx_refuses_sets_that_do_not_fit(tmp_path, change, said):
    members = {name: blob for name, blob in {**mnist()[0], **change}.items() if blob is not None}
    with pytest.raises(DatasetUnreadable, match=said):
        open_idx(packed(tmp_path / "m.zip", members), None)
