"""Every row of the tables in docs/data.md, "File forms", made and read through `inspect`."""

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from base.errors import DatasetUnreadable
from kdcore.data import inspect
from tests.base.test_file_kinds import STARTS
from tests.kdcore.data.making import class_folders, png
from tests.kdcore.data.test_parquet import needs_pyarrow, table, written
from tests.kdcore.data.test_published import cifar10, idx, mnist

X = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
Y = np.arange(40) % 4
DOCUMENT = Path(__file__).parents[3] / "docs" / "data.md"


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, blob in members.items():
            archive.writestr(name, blob)
    return out.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, blob in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    return out.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def facts_of(content: bytes, tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(content)
    return inspect(path, None)


CIFAR_BINARY = {
    f"cifar-10-batches-bin/{name}.bin": np.column_stack(
        [np.arange(20) % 10, np.arange(20).repeat(3072).reshape(20, 3072)]
    )
    .astype(np.uint8)
    .tobytes()
    for name in ("data_batch_1", "test_batch")
}
READ = {
    "folders-zip": (lambda: zipped(class_folders()), (6, 6, False, 2)),
    "folders-tar": (lambda: tarred(class_folders(), "w"), (6, 6, False, 2)),
    "folders-tar.gz": (lambda: tarred(class_folders()), (6, 6, False, 2)),
    "npz": (lambda: npz(x_train=X, y_train=Y, x_test=X[:8], y_test=Y[:8]), (40, 8, False, 4)),
    "npz-X": (lambda: npz(X_train=X, y_train=Y, X_test=X[:8], y_test=Y[:8]), (40, 8, False, 4)),
    "npz-medmnist": (
        lambda: npz(train_images=X, train_labels=Y[:, None], test_images=X[:8], test_labels=Y[:8, None]),
        (40, 8, False, 4),
    ),
    "npz-train_x": (lambda: npz(train_x=X[..., 0], train_y=Y), (36, 4, True, 4)),
    "npz-x-y": (lambda: npz(x=X, y=Y), (36, 4, True, 4)),
    "npz-images-labels": (lambda: npz(images=X, labels=Y), (36, 4, True, 4)),
    "npz-data-target": (lambda: npz(data=X, target=Y), (36, 4, True, 4)),
    "npz-x-alone": (lambda: npz(x=X), (40, 0, False, 0)),
    "npz-images-alone": (lambda: npz(images=X), (40, 0, False, 0)),
    "cifar-python": (lambda: tarred(cifar10()), (100, 10, False, 10)),
    "cifar-python-zip": (lambda: zipped(cifar10()), (100, 10, False, 10)),
    "cifar-python-without-a-batch": (
        lambda: zipped({name: blob for name, blob in cifar10().items() if not name.endswith("_4")}),
        (80, 10, False, 10),
    ),
    "cifar-binary": (lambda: tarred(CIFAR_BINARY), (20, 20, False, 10)),
    "idx-tar": (lambda: tarred(mnist()[0], "w"), (30, 10, False, 10)),
    "idx-zip-gz": (
        lambda: zipped({f"{name}.gz": gzip.compress(blob) for name, blob in mnist()[0].items()}),
        (30, 10, False, 10),
    ),
    "idx-train": (lambda: zipped(mnist(40, 0)[0]), (36, 4, True, 10)),
    "idx-alone": (lambda: idx(X[..., 0]), (40, 0, False, 0)),
    "idx-alone-gz": (lambda: gzip.compress(idx(X[..., 0])), (40, 0, False, 0)),
}


@pytest.mark.parametrize("form", READ)
def test_open_file_reads_the_documented_form(tmp_path, form):
    make, (train, test, carved, classes) = READ[form]
    facts = facts_of(make(), tmp_path)
    assert (facts.train, facts.test, facts.test_carved, facts.num_classes) == (train, test, carved, classes)
    assert facts.labelled == (classes > 0)


@needs_pyarrow
def test_open_file_reads_tables_alone_and_in_archives(tmp_path):
    made = table([row % 2 for row in range(20)], names=["a", "b"])
    blob = written(tmp_path / "x", made).read_bytes()
    assert facts_of(blob, tmp_path).train == 18
    shards = {"data/train-00000-of-00001.parquet": blob, "data/test-00000-of-00001.parquet": blob}
    for packed in (zipped(shards), tarred(shards)):
        assert (facts_of(packed, tmp_path).train, facts_of(packed, tmp_path).test) == (20, 20)
    assert not facts_of(written(tmp_path / "x", made.drop_columns(["label"])).read_bytes(), tmp_path).labelled


NOT_READ = {
    "hwcn": (lambda: npz(x_train=X.transpose(1, 2, 3, 0), y_train=Y), "has shape", "x_train.transpose(3, 0, 1, 2)"),
    "cnhw": (lambda: npz(X_train=X.transpose(3, 0, 1, 2), y_train=Y), "has shape", "X_train.transpose(1, 0, 2, 3)"),
    "hwn": (
        lambda: npz(x_train=X[..., 0].transpose(1, 2, 0), y_train=Y),
        "40 labels for 4 images",
        "numpy.moveaxis(x_train, -1, 0)",
    ),
    "flat-grey": (lambda: npz(x=X[..., 0].reshape(40, 16), y=Y), "has shape", "x.reshape(-1, 4, 4)"),
    "flat-rgb": (lambda: npz(x=X.reshape(40, 48), y=Y), "has shape", "x.reshape(-1, 3, 4, 4)"),
    "floats": (lambda: npz(x_train=X / 255, y_train=Y), "float64; images are uint8", "astype('uint8')"),
    "sixteen-bits": (lambda: npz(x=X.astype(np.uint16), y=Y), "x is uint16", "(x // 257).astype('uint8')"),
    "cut-out": (lambda: npz(x=X > 9, y=Y), "x is bool", "x.astype('uint8') * 255"),
    "chwn": (lambda: npz(x=X.transpose(3, 1, 2, 0), y=Y), "has shape (3, 4, 4, 40)", "x.transpose(3, 1, 2, 0)"),
    "labels-one-hot": (lambda: npz(x=X, y=np.eye(4)[Y % 4]), "y is float64", "y.argmax(1)"),
    "labels-float": (lambda: npz(x=X, y=Y / 1), "y is float64", "y.ravel().astype('int64')"),
    "labels-text": (lambda: npz(x=X, y=np.array(["a", "b"])[Y % 2]), "y is <U1", "numpy.unique(y, return_inverse"),
    "tga": (lambda: zipped({"a/1.tga": b"tga", "b/1.tga": b"tga"}), "a/1.tga is not an image", "to PNG or JPEG"),
    "csv-of-pixels": (lambda: ",".join(f"pixel{at}" for at in range(784)).encode(), "a table of text", "pixels"),
    "webdataset": (lambda: tarred({"0.jpg": png(), "0.cls": b"1"}), "a webdataset", "folder of its class"),
    "torchscript": (lambda: zipped({"m/data.pkl": b"", "m/constants.pkl": b""}), "TorchScript", "models add"),
    "checkpoint": (lambda: zipped({"m/data.pkl": b"", "m/data/0": b""}), "PyTorch checkpoint", "models add"),
    "keras": (lambda: zipped({"config.json": b"{}", "model.weights.h5": b""}), "Keras", "models add"),
    "savedmodel": (lambda: tarred({"m/saved_model.pb": b"", "m/variables/x": b""}), "SavedModel", "models add"),
    "office": (lambda: zipped({"[Content_Types].xml": b""}), "office", ".npz"),
    "nested": (lambda: zipped({"inner.zip": zipped(class_folders())}), "archive of archives", "inner archive"),
    "npy-folders": (lambda: zipped({"a/1.npy": b"", "b/1.npy": b""}), "numpy array", "numpy.savez"),
    "gz-csv": (lambda: gzip.compress(b"label,a\n1,2\n"), "a gzip file of a table", "pixels"),
    "gz-npy": (lambda: gzip.compress(b"\x93NUMPY\x01\x00"), "a gzip file of one numpy array", "numpy.savez"),
    "gz-cut": (lambda: gzip.compress(tarred(class_folders(), "w"))[:40], "cannot be unpacked", "again"),
    "idx-labels": (lambda: idx(np.arange(9, dtype=np.uint8)), "holds labels", "together"),
    "unknown": (lambda: bytes(range(256)), "no kind that is known: it begins with 00 01 02", ".npz"),
    "zeros": (lambda: bytes(2000), "no kind that is known", ".npz"),
    "empty": (lambda: b"", "is empty", ".npz"),
    "csv-in-zip": (lambda: zipped({"train.csv": b"a,b\n1,2\n"}), "a table of text", "together with the pictures"),
}


@pytest.mark.parametrize("form", NOT_READ)
def test_open_file_names_what_is_not_read_and_what_helps(tmp_path, form):
    make, said, hint = NOT_READ[form]
    with pytest.raises(DatasetUnreadable) as caught:
        facts_of(make(), tmp_path)
    assert said in str(caught.value) and hint in str(caught.value.hint)


@pytest.mark.parametrize("number", range(len(STARTS)), ids=lambda number: f"{STARTS[number][1]}-{number}")
def test_open_file_names_every_kind_of_the_table(tmp_path, number):
    head, words = STARTS[number]
    if words in ("idx", "Parquet"):
        pytest.skip("this kind is read")
    with pytest.raises(DatasetUnreadable) as caught:
        facts_of(head + bytes(600), tmp_path) if words not in (".csv", "JSON") else facts_of(head, tmp_path)
    assert words in str(caught.value) and ".npz" in str(caught.value.hint)


def test_open_file_still_reads_pictures_without_suffixes_beside_notes(tmp_path):
    members = {name.removesuffix(".png"): blob for name, blob in class_folders().items()}
    assert facts_of(zipped({**members, "train/labels.csv": b"a,b\n1,2\n"}), tmp_path).train == 6
    # A picture named as a part of CIFAR-100, which comes with a file `meta`, is a picture.
    assert facts_of(zipped({**members, "train/cat/train": png()}), tmp_path).train == 7


def test_open_file_knows_an_old_tar_by_its_checksum(tmp_path):
    blob = bytearray(tarred(class_folders(), "w"))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in class_folders().items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    old = bytearray(out.getvalue())
    # The form of before 1988 has no magic; its checksum is that of the rest.
    at = 0
    while old[at]:
        size = int(old[at + 124 : at + 135], 8)
        old[at + 257 : at + 265] = bytes(8)
        old[at + 148 : at + 156] = b" " * 8
        old[at + 148 : at + 155] = b"%06o\0" % sum(old[at : at + 512])
        at += 512 + -(-size // 512) * 512
    assert facts_of(bytes(old), tmp_path).train == facts_of(bytes(blob), tmp_path).train == 6


def test_open_file_never_runs_a_pickle(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for blob in (
        pickle.dumps(Evil()),
        gzip.compress(pickle.dumps(Evil())),
        zipped({"data_batch_1": pickle.dumps(Evil())}),
    ):
        with pytest.raises(DatasetUnreadable):
            facts_of(blob, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_document_has_a_row_for_every_form_that_is_made_here():
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    text = "\n".join(rows)
    for word in (
        *(".npz", "cifar-10-python.tar.gz", "cifar-100-binary.tar.gz", "idx", ".parquet", "MedMNIST", "a folder"),
        *(
            ".npy",
            ".rar",
            ".7z",
            ".zst",
            ".csv",
            ".mat",
            ".h5",
            "TFRecord",
            "webdataset",
            "ONNX",
            "TFLite",
            "TorchScript",
        ),
    ):
        assert word in text, word
