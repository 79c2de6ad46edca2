from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest

from base.errors import DatasetUnreadable
from kdcore.data.tables import Tables


@dataclass
class File:
    ordinal: int
    name: str


FILES = [File(0, "w/images/a.png"), File(1, "w/images/b.JPG"), File(2, "w/images/c d.png"), File(3, "w/images/e.f.png")]


def tables(**texts: str | bytes) -> Tables:
    """Tables by name; a dot is written as two underscores."""
    contents = [
        (PurePosixPath(name.replace("__", ".")), text if isinstance(text, bytes) else text.encode())
        for name, text in texts.items()
    ]
    return Tables(lambda: iter(contents))


def labels(of: Tables, **known: object) -> dict[int, str]:
    return {at: one.label for at, one in of.of(FILES, **known).items()}  # type: ignore[arg-type]


ALL = {0: "cat", 1: "dog", 2: "cat", 3: "dog"}


@pytest.mark.parametrize(
    "text",
    [
        "filename,label\na.png,cat\nb.JPG,dog\nc d.png,cat\ne.f.png,dog\n",
        "Image_ID,Height,Class Name\na,4,cat\nb,4,dog\nc d,4,cat\ne.f,4,dog\n",
        "class;path\ncat;images/a.png\ndog;./images/b.JPG\ncat;w\\images\\c d.png\ndog;/home/me/w/images/e.f.png\n",
        "label\tfile\r\ncat\ta.png\r\ndog\tb.JPG\r\ncat\tc d.png\r\ndog\te.f.png\r\n",
        "a.png cat\nb.JPG dog\nc d.png cat\ne.f.png dog",
        "picture,animal\na.png,cat\nb.JPG,dog\nc d.png,cat\ne.f.png,dog\n",
        '"id","label"\n"a"," cat "\n"b","dog"\n"c d","cat"\n"e.f","dog"\n\n',
        "ImageId,PredictionString\na,cat 1 2 3 4\nb,dog 1 2 3 4\nc d,cat 1 2 3 4\ne.f,dog 1 2 3 4\n",
    ],
    ids=["csv", "without suffix", "paths", "tabs", "blanks", "other header", "quoted", "kaggle"],
)
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_reads_file_and_label(text, coding):
    assert labels(tables(x__csv=text.encode(coding))) == ALL


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just some words of a note",
        "a,b,c\n1,2,3\n",
        b"\xff\x00\x80",
        "0 0.5 0.5 0.1 0.1\n",
        "filename,label\nq,cat\n",
    ],
)
def test_tables_of_other_texts_say_nothing(text):
    assert labels(tables(x__csv=text)) == {}


def test_tables_of_splits_by_column_or_by_the_name_of_the_table():
    column = tables(
        x__csv="filename,label,split\na.png,cat,train\nb.JPG,dog,test\nc d.png,cat,train\ne.f.png,dog,test\n"
    )
    assert [one.split for one in column.of(FILES).values()] == ["train", "test", "train", "test"]
    two = tables(train__csv="file,label\na.png,cat\nc d.png,cat\n", test__csv="file,label\nb.JPG,dog\ne.f.png,dog\n")
    assert {at: one.split for at, one in two.of(FILES).items()} == {0: "train", 2: "train", 1: "test", 3: "test"}


def test_tables_of_labels_may_be_numbers_of_known_classes():
    listed = tables(val__txt="a.png 1\nb.JPG 0\nc d.png 1\ne.f.png 0\n")
    assert labels(listed, classes=["dog", "cat"]) == ALL
    assert labels(listed, classes=["0", "1"]) == {0: "1", 1: "0", 2: "1", 3: "0"}
    beyond = tables(val__txt="a.png 1\nb.JPG 2\nc d.png 1\ne.f.png 2\n")
    assert labels(beyond, classes=["dog", "cat"]) == {}, "labels from 1 do not fit two classes"


def test_tables_of_a_number_for_each_image_is_no_label():
    files = [File(n, f"{n}.png") for n in range(40)]
    assert tables(x__txt="\n".join(f"{n} {n + 1}" for n in range(40))).of(files) == {}


def test_tables_of_files_of_one_name_are_told_apart_by_their_folders():
    files = [File(0, "train/a.png"), File(1, "test/a.png")]
    roles = {0: "train", 1: "test"}
    two = tables(train__csv="file,label\na.png,cat\n", test__csv="file,label\na.png,dog\n")
    assert {at: one.label for at, one in two.of(files, roles=roles).items()} == {0: "cat", 1: "dog"}
    paths = tables(x__csv="file,label\ntrain/a.png,cat\ntest/a.png,dog\n")
    assert {at: one.label for at, one in paths.of(files).items()} == {0: "cat", 1: "dog"}
    with pytest.raises(
        DatasetUnreadable, match=r"x\.csv names 'a\.png', which stands for train/a\.png and test/a\.png"
    ):
        tables(x__csv="file,label\na.png,cat\n").of(files)


def test_tables_of_contradictions_are_refused():
    with pytest.raises(DatasetUnreadable, match=r"x\.csv: w/images/a\.png has the label 'cat' and the label 'dog'"):
        labels(tables(x__csv="file,label\na.png,cat\na.png,dog\n"))
    with pytest.raises(DatasetUnreadable, match=r"x\.csv and y\.csv: w/images/a\.png"):
        labels(tables(x__csv="file,label\na.png,cat\n", y__csv="file,label\na.png,dog\n"))


def test_tables_useless_ones_are_counted():
    read = tables(x__csv="file,label\nq.png,cat\nr.png,dog\n")
    assert read.of(FILES) == {}
    assert [(one.what, one.count) for one in read.useless] == [("x.csv", 2)]


def test_tables_of_class_folders_only_add_splits():
    folders = {0: "cat", 1: "dog", 2: "cat", 3: "dog"}
    plain = "file,label\na.png,0\nb.JPG,1\nc d.png,0\ne.f.png,1\n"
    assert labels(tables(x__csv=plain), folders=folders) == {}
    split = "file,label,set\na.png,0,train\nb.JPG,1,train\nc d.png,0,test\ne.f.png,1,test\n"
    assert labels(tables(x__csv=split), folders=folders) == ALL
    with pytest.raises(DatasetUnreadable, match="other classes than their folders do"):
        labels(tables(x__csv=plain.replace("c d.png,0", "c d.png,1")), folders=folders)


@pytest.mark.parametrize(
    ("header", "said", "splits"),
    [
        ("part of", ("train", "test"), ("train", "test")),
        ("is_training", ("1", "0"), ("train", "test")),
        ("Is Test", ("False", "True"), ("train", "test")),
        ("note", ("train", "a train"), (None, None)),
        ("note", ("train", "train"), (None, None)),
        ("bright", ("1", "0"), (None, None)),
    ],
)
def test_tables_of_columns_of_splits_by_their_values(header, said, splits):
    text = f"filename,{header},label\na.png,{said[0]},cat\nb.png,{said[1]},dog"
    found = tables(list=text).of([File(0, "a.png"), File(1, "b.png")])
    assert tuple(found[at].split for at in (0, 1)) == splits


def test_tables_of_empty_labels_are_none():
    read = tables(x__csv="file,label\na.png,cat\nb.JPG,\nc d.png,NaN\ne.f.png,nan\na.png,\n")
    assert labels(read) == {0: "cat"}
    assert read.without_label == {1: "x.csv", 2: "x.csv", 3: "x.csv"}, "an image with a label in another row has one"
    assert labels(read, classes=["cat", "nan"]) == {0: "cat", 3: "nan"}, "it is the name of a known class"


def test_tables_of_columns_of_folds_are_named_unless_there_are_splits():
    folds = tables(x__csv="file,label,k-fold\na.png,cat,0\nb.JPG,dog,1\n")
    assert labels(folds) == {0: "cat", 1: "dog"}
    assert [(one.what, one.count) for one in folds.ignored] == [("the column 'k-fold' of x.csv", 2)]
    both = tables(x__csv="file,label,fold,split\na.png,cat,0,train\nb.JPG,dog,1,test\n")
    assert labels(both) == {0: "cat", 1: "dog"} and both.ignored == []


def test_tables_of_names_that_differ_in_case_or_suffix():
    read = tables(x__csv="file,label\nA.PNG,cat\nb.jpg,dog\nC D.jpeg,cat\nIMAGES/e.f.tif,dog\n")
    assert labels(read) == ALL
    assert read.respelled == {0: "A.PNG", 1: "b.jpg", 2: "C D.jpeg", 3: "IMAGES/e.f.tif"}


@pytest.mark.parametrize(
    ("files", "text", "found"),
    [
        (["a.jpg", "a.png"], "a.bmp,cat", {}),
        (["a.jpg", "A.jpg"], "a.JPG,cat", {}),
        (["a.jpg"], "a.jpg,cat\nA.jpg,dog", {0: "cat"}),
        (["a.jpg", "b.jpg"], "A.jpg,cat\na.png,cat\nb.jpg,dog", {1: "dog"}),
        (["a.jpg", "b.jpg"], "A.jpg,cat\nA.jpg,dog\nb.jpg,dog", {1: "dog"}),
        (["a.1.jpg", "a.2.jpg"], "A.1,cat\nA.2.png,dog", {0: "cat", 1: "dog"}),
        (["x/a.jpg", "y/a.jpg"], "X/a.png,cat\nY/a.png,dog", {0: "cat", 1: "dog"}),
    ],
)
def test_tables_of_other_spellings_only_of_one_image(files, text, found):
    images = [File(at, name) for at, name in enumerate(files)]
    read = tables(x__csv=f"file,label\n{text}\n").of(images)
    assert {at: one.label for at, one in read.items()} == found
