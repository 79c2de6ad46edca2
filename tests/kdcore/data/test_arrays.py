import io
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy

from base.errors import DatasetUnreadable
from kdcore.data import arrays
from kdcore.data.archive import Limits
from kdcore.data.arrays import open_arrays
from kdcore.data.decoding import decode, with_options
from kdcore.spec import DataOptions


def pixels(source, split="train"):
    found = np.zeros((len(source.labels[split]), source.channels, source.height, source.width), np.uint8)
    for name, rows, piece in source.pieces():
        if name == split:
            found[rows] = piece
    return found


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_open_arrays_channels_last_channels_first_and_grey(npz):
    x = images(6, 4, 5, 3)
    assert (pixels(open_arrays(npz(x_train=x, x_test=x[:3]), None)) == x.transpose(0, 3, 1, 2)).all()
    first = x.transpose(0, 3, 1, 2).copy()
    assert (pixels(open_arrays(npz(x_train=first, x_test=first[:3]), None)) == first).all()
    grey = x[..., 0].copy()
    source = open_arrays(npz(x_train=grey, x_test=grey[:3]), None)
    assert source.channels == 1 and (pixels(source)[:, 0] == grey).all()


def test_open_arrays_memory_order_does_not_matter(npz):
    x = images(6, 4, 4, 3)
    assert (pixels(open_arrays(npz(x_train=np.asfortranarray(x)), None)) == x.transpose(0, 3, 1, 2)).all()


def test_open_arrays_many_small_chunks_are_one_array(npz, monkeypatch):
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 100)
    x = images(6, 4, 4, 3)
    path = npz(x_train=x, y_train=np.array([0, 1] * 3), x_test=None, y_test=None)
    source = open_arrays(path, None)
    assert source.test_carved and len(list(source.pieces())) == 4
    both = np.concatenate([pixels(source, "train"), pixels(source, "test")])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in x.transpose(0, 3, 1, 2))


def test_open_arrays_carved_labels_stay_with_their_images(npz):
    y = np.arange(50) % 5
    x = np.repeat(y, 48).astype(np.uint8).reshape(50, 4, 4, 3)
    source = open_arrays(npz(x_train=x, y_train=y, x_test=None, y_test=None), None)
    for split, count in (("train", 45), ("test", 5)):
        assert pixels(source, split)[:, 0, 0, 0].tolist() == source.labels[split].tolist()
        assert len(source.labels[split]) == count


@pytest.mark.parametrize("options", [DataOptions(), DataOptions(channels=1), DataOptions(image_size=8)])
def test_decode_masks_of_0_and_1_have_the_largest_value_1(npz, options):
    source = with_options(open_arrays(npz(x_train=images(6, 4, 4, 3) // 128), options), options)
    assert source.facts(decode(source), None).largest == 1


def test_open_arrays_an_image_size_resizes(npz):
    x = np.full((6, 4, 8, 3), 9, np.uint8)
    source = open_arrays(npz(x_train=x, x_test=x[:3]), DataOptions(image_size=6))
    assert pixels(source).shape == (6, 3, 6, 6) and (pixels(source) == 9).all()


@pytest.mark.parametrize("names", [np.array(["a", "b", "é"]), np.array(["a", "b", "é".encode()], dtype="S2")])
def test_open_arrays_class_names(npz, names):
    assert open_arrays(npz(class_names=names), None).class_names == ("a", "b", "é")


def test_open_arrays_numbers_stand_in_for_missing_names_and_columns_of_labels_are_read(npz):
    source = open_arrays(npz(y_train=np.array([[0], [1], [2], [0], [1], [2]], dtype=np.uint8)), None)
    assert source.class_names == ("0", "1", "2")
    assert source.labels["train"].dtype == np.int64


@pytest.mark.parametrize("name", ["x", "x_train"])
def test_open_arrays_images_alone_have_no_labels(tmp_path, name):
    x = images(5, 4, 6, 3)
    np.savez(tmp_path / "pool.npz", **{name: x})
    source = open_arrays(tmp_path / "pool.npz", None)
    assert source.class_names == () and source.labels["train"].tolist() == [-1] * 5
    assert len(source.labels["test"]) == 0 and not source.test_carved
    assert (pixels(source) == x.transpose(0, 3, 1, 2)).all()
    assert pixels(open_arrays(tmp_path / "pool.npz", DataOptions(image_size=8))).shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    "names",
    [
        ("X_train", "y_train", "X_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("train_x", "train_y", "test_x", "test_y"),
    ],
)
def test_open_arrays_other_usual_names(tmp_path, names):
    x, y = images(6, 4, 5, 3), np.array([0, 1, 2] * 2)
    arrays_of = dict(zip(names, (x, y, x[:3], y[:3]), strict=True))
    np.savez(tmp_path / "a.npz", classes=np.array(["a", "b", "c"]), **arrays_of)
    source = open_arrays(tmp_path / "a.npz", None)
    assert source.class_names == ("a", "b", "c") and not source.test_carved
    assert (pixels(source) == x.transpose(0, 3, 1, 2)).all() and source.labels["train"].tolist() == y.tolist()


def test_open_arrays_two_names_for_one_array_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=images(6, 4, 4), X_train=images(6, 4, 4), y_train=np.array([0, 1] * 3))
    with pytest.raises(DatasetUnreadable, match="X_train and x_train both stand for x_train"):
        open_arrays(tmp_path / "a.npz", None)


@pytest.mark.parametrize("label", [10**9, 6, np.iinfo(np.int64).max])
def test_open_arrays_more_classes_than_images_are_refused_before_names_are_made(npz, label):
    with pytest.raises(DatasetUnreadable, match=f"labels of 6 training images go up to {label}"):
        open_arrays(npz(y_train=np.array([0, 1, 2, 3, 4, label])), None)


def test_open_arrays_is_bounded_by_the_ratio_of_archives(npz, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "LIMITS", Limits(ratio_from_bytes=10_000))
    even = np.zeros((200, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "a.npz", x=even)
    with pytest.raises(DatasetUnreadable, match=r"The \.npz file unpacks to more than 100 times its size"):
        open_arrays(tmp_path / "a.npz", None)
    np.savez(tmp_path / "a.npz", x=even)
    assert len(open_arrays(tmp_path / "a.npz", None).labels["train"]) == 200


def test_open_arrays_bounds_all_arrays_together(npz, tmp_path, monkeypatch):
    """Each is small enough; a job on the three would fill a disk."""
    monkeypatch.setattr(arrays, "LIMITS", Limits(ratio_from_bytes=700_000))
    even, labels = np.zeros((100, 32, 32, 3), np.uint8), np.arange(100) % 2
    parts = {f"{kind}_{name}": of for name in ("train", "val", "test") for kind, of in (("x", even), ("y", labels))}
    np.savez_compressed(tmp_path / "a.npz", **{name: parts[name] for name in ("x_train", "y_train")})
    assert len(open_arrays(tmp_path / "a.npz", None).labels["test"]) == 10
    np.savez_compressed(tmp_path / "a.npz", **parts)
    with pytest.raises(DatasetUnreadable, match="looks like a bomb"):
        open_arrays(tmp_path / "a.npz", None)


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ({"rows": 5}, "x_train holds 6 images; the most is 5"),
        ({"classes": 2}, "labels go up to 2; there may be 2 classes"),
        ({"arrays": 3}, "more than 3 arrays"),
    ],
)
def test_open_arrays_bounds_images_classes_and_arrays(npz, monkeypatch, limit, text):
    monkeypatch.setattr(arrays, "LIMITS", Limits(**limit))
    with pytest.raises(DatasetUnreadable, match=text):
        open_arrays(npz(), None)


def test_open_arrays_bounds_the_number_of_names_before_they_are_made(npz, monkeypatch):
    monkeypatch.setattr(arrays, "LIMITS", Limits(classes=2))
    with pytest.raises(DatasetUnreadable, match="class_names has 3 names; the most is 2"):
        open_arrays(npz(class_names=np.array(list("abc"))), None)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ("(1000000000000000000,)", "y_train is cut short: its shape is (1000000000000000000,), but it has 48 bytes"),
        ("(99999999999999999999999,)", "y_train is cut short"),
        ("(6, 1000000000000)", "y_train is cut short"),
        ("(3,)", "y_train is longer than it says: its shape is (3,)"),
        ("(-1,)", "y_train has the shape (-1,), which no array has"),
        ("(True,)", "y_train has the shape (True,), which no array has"),
        ("(10**18,)", "y_train cannot be read"),
        ("(" * 3000 + ")" * 3000, "y_train cannot be read"),
    ],
)
def test_open_arrays_labels_of_an_impossible_shape(npz, tmp_path, shape, text):
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}"
    header += " " * (63 - (len(header) + 10) % 64) + "\n"
    with zipfile.ZipFile(npz()) as old, zipfile.ZipFile(tmp_path / "b.npz", "w") as new:
        for name in old.namelist():
            forged = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + bytes(48)
            new.writestr(name, forged if name == "y_train.npy" else old.read(name))
    with pytest.raises(DatasetUnreadable, match=re.escape(text)):
        open_arrays(tmp_path / "b.npz", None)


def test_open_arrays_splits_without_a_task_are_left_out(npz):
    x, y = images(3, 4, 4, 3), np.array([0, 1, 2])
    more = {f"{kind}_{name}": array for name in ("val", "eval", "dev") for kind, array in (("x", x), ("y", y))}
    source = open_arrays(npz(**more, class_names=np.array(list("abc")), ids=np.array([None, 1])), None)
    assert dict(source.splits) == {"x_train": 6, "x_val": 3, "x_test": 3}
    assert [(one.what, one.count) for one in source.left_out] == [
        *(("ids", 2), ("x_dev", 3), ("x_eval", 3), ("y_dev", 3), ("y_eval", 3)),
    ]
    assert (pixels(source, "val") == x.transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y_val": np.array([0, 1, 3])}, "y_val row 2 is 3"),
        ({"x_val": np.zeros((3, 5, 5, 3), np.uint8)}, r"x_val of \(5, 5, 3\)"),
        (
            {
                "x_dev": images(3, 4, 4, 3),
                "y_dev": np.zeros(3, int),
                "x_devel": images(3, 4, 4, 3),
                "y_devel": np.zeros(3, int),
            },
            "named like the split 'dev'",
        ),
    ],
    ids=["labels", "size", "two of a name"],
)
def test_open_arrays_a_validation_split_must_fit(npz, change, said):
    good = {"x_val": images(3, 4, 4, 3), "y_val": np.array([0, 1, 2])}
    with pytest.raises(DatasetUnreadable, match=said):
        open_arrays(npz(**(good | change)), None)


def with_member(good: Path, folder: Path, name: str, blob: bytes) -> Path:
    """The same .npz, but for one member."""
    path = folder / "changed.npz"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            new.writestr(member, blob if member == f"{name}.npy" else old.read(member))
    return path


OBJECTS = np.array([{}, [], "x"], dtype=object)


@pytest.mark.parametrize(
    ("change", "said", "hint"),
    [
        ({"y_train": None, "x_test": None, "y_test": None, "class_names": np.array(["a"])}, "lacks y_train", "x alone"),
        ({"x_train": None}, "lacks x_train; it holds x_test, y_test, y_train", "x_train, y_train, x_test"),
        ({"y_test": None}, "lacks y_test", ""),
        ({"x_train": np.zeros((6, 4, 4, 3), np.float32)}, "x_train is float32; images are uint8", "astype"),
        ({"x_train": np.zeros((6, 48), np.uint8)}, r"x_train has shape \(6, 48\)", "N x H x W"),
        ({"x_train": np.zeros((6, 4, 4, 5), np.uint8)}, r"x_train has shape \(6, 4, 4, 5\)", "N x H x W"),
        ({"x_test": np.zeros((0, 4, 4, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test is empty", ""),
        ({"x_test": np.zeros((3, 5, 4, 3), np.uint8)}, r"x_train holds images of shape \(4, 4, 3\), x_test of", ""),
        ({"y_train": np.arange(5)}, "y_train has 5 labels for 6 images", ""),
        ({"y_train": np.zeros(6)}, "y_train is float64", "astype('int64')"),
        ({"y_train": np.eye(6, dtype=int)}, r"y_train is int64 of shape \(6, 6\)", "argmax"),
        ({"y_train": np.array([0, 1, 2, -1, 1, 2])}, "y_train row 3 is -1; labels run from 0 to 2", ""),
        ({"y_test": np.array([0, 3, 1])}, "y_test row 1 is 3; labels run from 0 to 2", ""),
        ({"y_train": np.array([1, 2, 3, 1, 2, 3])}, "No training image has label 0", "Labels run from 0"),
        ({"class_names": np.array(["a", "b"])}, "y_train row 2 is 2; labels run from 0 to 1", ""),
        ({"class_names": np.array(list("abcd"))}, r"No training image has label 3 \(class 'd'\)", ""),
        ({"class_names": np.arange(3)}, "class_names is int64", ""),
        ({"class_names": OBJECTS}, "class_names holds Python objects", "plain"),
        ({"y_train": np.array([0, 1, 2] * 2, dtype=object)}, "y_train holds Python objects", "plain"),
        ({"x_train": np.array([None] * 6)}, "x_train holds Python objects", "plain"),
    ],
)
def test_open_arrays_what_is_refused(npz, change, said, hint):
    with pytest.raises(DatasetUnreadable, match=said) as caught:
        open_arrays(npz(**change), None)
    assert hint in (caught.value.hint or "")


def test_open_arrays_a_header_that_claims_more_than_there_is(npz, tmp_path):
    """A shape of terabytes must not be believed."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (6, 1 << 20, 1 << 20, 3)})
    path = with_member(npz(), tmp_path, "x_train", header.getvalue() + bytes(100))
    with pytest.raises(DatasetUnreadable, match=r"x_train is cut short: .* but it has 100 bytes"):
        open_arrays(path, None)


@pytest.mark.parametrize(
    "blob",
    [b"", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|u1', (", b"\x93NUMPY\x07\x00" + bytes(99), b"\x80\x04pickle"],
    ids=["empty", "cut header", "unknown version", "pickle"],
)
def test_open_arrays_members_that_are_no_arrays_are_named(npz, tmp_path, blob):
    for name in ("x_train", "y_train"):
        with pytest.raises(DatasetUnreadable, match=f"{name} cannot be read"):
            open_arrays(with_member(npz(), tmp_path, name, blob), None)


def test_open_arrays_a_damaged_array_is_named(npz):
    path = npz()
    blob = bytearray(path.read_bytes())
    blob[blob.index(bytes(range(64, 80)))] ^= 0xFF
    path.write_bytes(blob)
    with pytest.raises(DatasetUnreadable, match="x_train cannot be read"):
        list(open_arrays(path, None).pieces())


def test_open_arrays_labels_of_absurd_length_are_not_read(npz, monkeypatch):
    monkeypatch.setattr(arrays, "_SMALL_BYTES", 100)
    with pytest.raises(DatasetUnreadable, match="y_train has 176 bytes; the most is 100"):
        open_arrays(npz(), None)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (np.zeros((6, 4, 4, 3), np.float32), "x is float32; images are uint8"),
        (np.zeros((0, 4, 4, 3), np.uint8), "x is empty"),
        (np.zeros((6, 48), np.uint8), r"x has shape \(6, 48\)"),
        (np.array([None] * 6), "x holds Python objects"),
    ],
    ids=["floats", "no rows", "flat rows", "objects"],
)
def test_open_arrays_images_alone_are_held_to_the_same_rules(tmp_path, x, said):
    np.savez(tmp_path / "pool.npz", x=x)
    with pytest.raises(DatasetUnreadable, match=said):
        open_arrays(tmp_path / "pool.npz", None)


def test_open_arrays_are_squashed_padded_and_cropped_as_pictures_are(npz):
    """4 x 8 in vertical bands: the crop keeps the two in the middle, and says that half is left out."""
    bands = np.repeat(np.array([10, 20, 30, 40], np.uint8), 2)[None].repeat(4, 0)
    path = npz(x_train=np.stack([bands] * 6), x_test=np.stack([bands] * 3))

    def read(**given):
        source = open_arrays(path, DataOptions(image_size=4, interpolation="nearest", **given))
        return pixels(source)[0, 0], source

    crop, source = read()
    assert crop[0].tolist() == [20, 20, 30, 30] and source.pixels_cut == 0.5 and source.pictures == {"cut": 9}
    squashed, source = read(resize="squash")
    assert squashed[0].tolist() == [10, 20, 30, 40] and source.pixels_cut == 0 and source.pictures == {}
    padded, _ = read(resize="pad")
    assert padded.tolist() == [[0] * 4, [10, 20, 30, 40], [10, 20, 30, 40], [0] * 4]
