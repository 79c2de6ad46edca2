"""Tables of pictures as Hugging Face's `datasets` writes them. pyarrow is optional: without it these tests are skipped,
but for the one about that."""

import builtins
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from base.errors import DatasetUnreadable
from kdcore.data.archive import Limits
from kdcore.data.parquet import open_parquet
from kdcore.spec import DataOptions
from tests.kdcore.data.making import png

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = None

needs_pyarrow = pytest.mark.skipif(pyarrow is None, reason="pyarrow, the extra `parquet`, is not installed")


def table(labels, image="image", label="label", names=None, blobs=None, struct=True, **extra):
    """A table whose picture in row i is of the even value i, unless its blobs are given."""
    blobs = blobs if blobs is not None else [png(value=row) for row in range(len(labels))]
    images = [{"bytes": blob, "path": f"{row}.png"} for row, blob in enumerate(blobs)] if struct else blobs
    columns = {image: images, **({} if labels is None else {label: labels}), **extra}
    made = pyarrow.table(columns)
    if names is not None:
        notes = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}, image: {"_type": "Image"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(notes)})
    return made


def written(path: Path, made, **options) -> Path:
    parquet.write_table(made, path, **options)
    return path


def values(source, split="train") -> list[int]:
    found = np.zeros(source.shape(split), np.uint8)
    for name, rows, piece in source.pieces():
        if name == split:
            found[rows] = piece
    return found[:, 0, 0, 0].tolist()


@needs_pyarrow
@pytest.mark.parametrize("struct", [True, False], ids=["image", "bytes"])
def test_open_parquet_one_table_with_names(tmp_path, struct):
    labels = [row % 2 for row in range(40)]
    path = written(tmp_path / "x", table(labels, names=["cat", "dog"], struct=struct), row_group_size=7)
    source = open_parquet(path, None)
    assert source.class_names == ("cat", "dog") and source.test_carved
    assert (source.channels, source.height, source.width) == (3, 4, 4)
    for split, count in (("train", 36), ("test", 4)):
        assert len(source.labels[split]) == count
        assert [value % 2 for value in values(source, split)] == source.labels[split].tolist()
    assert sorted(values(source) + values(source, "test")) == list(range(40))


@needs_pyarrow
@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([3, 1, 0, 2] * 5, ("0", "1", "2", "3"), [3, 1, 0, 2]),
        (["wolf", "ant", "bee", "cat"] * 5, ("ant", "bee", "cat", "wolf"), [3, 0, 1, 2]),
    ],
    ids=["numbers", "text"],
)
def test_open_parquet_labels_without_names(tmp_path, labels, names, numbers):
    source = open_parquet(
        written(tmp_path / "x", table(labels, image="img", label="fine_label")), DataOptions(image_size=6)
    )
    assert source.class_names == names and (source.height, source.width) == (6, 6)
    assert all(numbers[value % 4] == label for value, label in zip(values(source), source.labels["train"], strict=True))


@needs_pyarrow
def test_open_parquet_without_labels_holds_images_alone(tmp_path):
    blobs = [png(value=row) for row in range(3)]
    source = open_parquet(written(tmp_path / "x", pyarrow.table({"image": [{"bytes": blob} for blob in blobs]})), None)
    assert source.class_names == () and source.labels["train"].tolist() == [-1] * 3
    assert values(source) == [0, 1, 2] and not source.test_carved


@needs_pyarrow
@pytest.mark.parametrize("other", ["test", "validation"])
def test_open_parquet_shards_in_an_archive_are_splits_by_name(tmp_path, other):
    parts = {"train-00001-of-00002": [10, 11], "train-00000-of-00002": [5, 6, 7], f"{other}-00000-of-00001": [50, 51]}
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, colours in parts.items():
            made = table([c % 2 for c in colours], names=["a", "b"], blobs=[png(value=c) for c in colours])
            archive.write(written(tmp_path / name, made), f"data/{name}.parquet")
    source = open_parquet(path, None, archive=True)
    assert values(source) == [5, 6, 7, 10, 11], "in the order of the shards' names"
    assert values(source, "test") == [50, 51] and not source.test_carved
    assert source.labels["train"].tolist() == [1, 0, 1, 0, 1]


@needs_pyarrow
def test_open_parquet_folders_tell_splits_too_and_a_spare_one_is_left_out(tmp_path):
    path = tmp_path / "x.zip"
    splits = {"train": [0, 1], "validation": [2, 3], "dev": [6, 7], "test": [4, 5]}
    with zipfile.ZipFile(path, "w") as archive:
        for name, colours in splits.items():
            made = table([c % 2 for c in colours], names=["a", "b"], blobs=[png(value=c) for c in colours])
            archive.write(written(tmp_path / name, made), f"default/{name}/0000.parquet")
    source = open_parquet(path, None, archive=True)
    assert [values(source, split) for split in ("train", "val", "test")] == [[0, 1], [2, 3], [4, 5]]
    assert [one.what for one in source.left_out] == ["default/dev/0000.parquet"]
    assert source.splits["default/validation/0000.parquet"] == 2
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "test", "test.parquet")
    with pytest.raises(DatasetUnreadable, match="named like a training split"):
        open_parquet(path, None, archive=True)


@needs_pyarrow
def test_open_parquet_grey_pictures_have_one_channel(tmp_path):
    blobs = [png(mode="L", value=row) for row in range(20)]
    assert open_parquet(written(tmp_path / "x", table([0, 1] * 10, blobs=blobs)), None).channels == 1


@needs_pyarrow
def test_open_parquet_refuses_what_is_wrong(tmp_path):
    def refusal(made, limits: Limits | None = None, **options) -> DatasetUnreadable:
        path = written(tmp_path / "x", made, **options)
        with pytest.raises(DatasetUnreadable) as caught:
            values(open_parquet(path, None, **({} if limits is None else {"limits": limits})))
        return caught.value

    assert "no column of pictures; its columns are a" in str(refusal(pyarrow.table({"a": [1, 2]})))
    assert "The table, row 1 has no picture" in str(refusal(table([0, 1], blobs=[png(), None])))
    assert "Row 1 of train has no label" in str(refusal(table([0, None])))
    assert "Row 1 of train has the label 5" in str(refusal(table([0, 5], names=["a", "b"])))
    assert "The table, row 1 is not an image" in str(refusal(table([0, 1], blobs=[png(), b"text"])))
    assert "images differ in size" in str(refusal(table([0, 1], blobs=[png(), png(width=9)])))
    assert "go up to 1000000000" in str(refusal(table([0, 10**9])))
    assert "has no rows" in str(refusal(table([0, 1]).slice(0, 0)))
    small = Limits(member_bytes=10)
    assert "a row group unpacks to" in str(refusal(table([0, 1]), small))
    assert "row_group_size" in str(refusal(table([0, 1]), small).hint)


@needs_pyarrow
def test_open_parquet_a_damaged_table_is_an_error_of_its_own(tmp_path):
    whole = written(tmp_path / "x", table([row % 2 for row in range(40)])).read_bytes()
    path = tmp_path / "damaged"
    for blob in (whole[:-9], whole[: len(whole) // 2] + b"PAR1", b"PAR1" + bytes(300) + b"PAR1"):
        path.write_bytes(blob)
        with pytest.raises(DatasetUnreadable, match="cannot be read as Parquet"):
            values(open_parquet(path, None))


def test_open_parquet_without_pyarrow_names_what_is_missing(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    path = tmp_path / "x"
    path.write_bytes(b"PAR1" + bytes(300) + b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DatasetUnreadable, match="is a Parquet table, and pyarrow is not installed") as caught:
        open_parquet(path, None)
    assert "pip install pyarrow" in str(caught.value.hint)
    assert caught.value.retryable, "an inspection must not remember it: pyarrow may be installed later"


@needs_pyarrow
def test_open_parquet_names_all_broken_pictures_or_skips_them(tmp_path):
    blobs = [png(value=value * 5, width=40, height=40) for value in range(30)]
    blobs[3], blobs[7] = b"text", blobs[7][:60]
    path = written(tmp_path / "x", table([0, 1] * 15, blobs=blobs))
    with pytest.raises(DatasetUnreadable, match=r"2 pictures cannot be read\. The table, row 3 .*row 7 .*") as caught:
        values(open_parquet(path))
    assert "skip_unreadable" in str(caught.value.hint)
    source = open_parquet(path, DataOptions(skip_unreadable=True))
    assert source.skipped == ["The table, row 3", "The table, row 7"] and source.pictures == {"colour": 28}
    kept = [value * 5 for value in range(30) if value not in (3, 7)]
    rows = [
        (value, label)
        for split in ("train", "test")
        for value, label in zip(values(source, split), source.labels[split].tolist(), strict=True)
    ]
    assert sorted(rows) == [(value, value // 5 % 2) for value in kept]


@needs_pyarrow
def test_open_parquet_broken_pictures_that_only_decoding_shows_are_named_at_once(tmp_path):
    blobs = [png(value=value * 5, width=40, height=40)[: 60 if value > 27 else None] for value in range(30)]
    with pytest.raises(DatasetUnreadable, match=r"2 pictures cannot be read\. .*row 28 .*row 29 "):
        values(open_parquet(written(tmp_path / "x", table([0, 1] * 15, blobs=blobs))))


@needs_pyarrow
def test_open_parquet_refuses_tables_whose_class_names_are_in_another_order(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
            archive.write(written(tmp_path / split, table([0, 1], names=names)), f"{split}.parquet")
    with pytest.raises(DatasetUnreadable, match="other names of classes than the tables before it, or another order"):
        open_parquet(path, None, archive=True)


@needs_pyarrow
def test_open_parquet_refuses_several_splits_in_one_table(tmp_path):
    labels = [0, 1] * 4
    mixed = table(labels, split=["train", "train", "test", "test"] * 2)
    with pytest.raises(DatasetUnreadable, match="the column 'split' has several splits") as caught:
        open_parquet(written(tmp_path / "x", mixed), None)
    assert "train.parquet, test.parquet" in str(caught.value.hint)
    for harmless in (["train"] * 8, ["left", "right"] * 4, [None] * 7 + ["train"]):
        assert open_parquet(written(tmp_path / "x", table(labels, split=harmless)), None).class_names == ("0", "1")


@needs_pyarrow
def test_open_parquet_labels_of_a_dictionary_are_text_and_other_types_are_refused(tmp_path):
    coded = pyarrow.array(["dog", "cat"] * 4).dictionary_encode()
    assert open_parquet(written(tmp_path / "x", table(coded, blobs=[png(value=9)] * 8)), None).class_names == (
        "cat",
        "dog",
    )
    for labels, kind in (([0.0, 1.0], "double"), ([True, False], "bool"), ([[0], [1]], "list")):
        with pytest.raises(DatasetUnreadable, match=f"the column 'label' is of the type {kind}"):
            open_parquet(written(tmp_path / "x", table(labels)), None)


@needs_pyarrow
def test_open_parquet_without_labels_lists_the_columns_that_might_be_labels(tmp_path):
    source = open_parquet(written(tmp_path / "x", table([0, 1, 0], label="kind")), None)
    assert [(one.what, one.count) for one in source.left_out] == [("the column 'kind'", 3)]
    assert source.class_names == ()


@needs_pyarrow
@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(rows=5), "more than 5 rows"),
        (Limits(pixels_from=100, pixels_a_byte=0), "it looks like a bomb"),
        (Limits(ratio_from_bytes=300, ratio=0), "unpacks to more than 0 times"),
    ],
    ids=["rows", "pixels", "bytes"],
)
def test_open_parquet_bounds_rows_pixels_and_bytes(tmp_path, limits, text):
    path = written(tmp_path / "a.parquet", table([0, 1] * 20))
    with pytest.raises(DatasetUnreadable, match=text):
        open_parquet(path, None, limits)


@needs_pyarrow
def test_open_parquet_stops_where_most_pictures_are_broken(tmp_path):
    path = written(tmp_path / "a.parquet", table([0, 1] * 20, blobs=[b"none"] * 40))
    with pytest.raises(DatasetUnreadable, match="rest behind 10 pictures was not read"):
        open_parquet(path, None, Limits(broken=10))
