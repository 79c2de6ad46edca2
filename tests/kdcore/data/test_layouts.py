"""Every row of the tables in docs/data.md, made and read; then what no table has."""

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from base.errors import DatasetUnreadable
from kdcore.data.arrays import open_arrays
from kdcore.data.decoding import Source, Sums
from kdcore.data.folders import open_folders
from kdcore.data.layouts import in_order
from kdcore.spec import dataset_warnings
from tests.kdcore.data.making import class_folders, png

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
BOTH = {"train": [3, 3], "test": [3, 3]}
ALL = {**BOTH, "val": [3, 3]}
CARVED = {"train": [9, 9], "test": [1, 1]}


def table(header: str) -> list[str]:
    """The first cells of a table of the page."""
    lines = PAGE.read_text().split(f"| {header} |", 1)[1].splitlines()[2:]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[: lines.index("")]]


def some_sums(source: Source) -> Sums:
    """Sums without a meaning, so that nothing is decoded."""
    sums = Sums(source.channels)
    sums.add(np.zeros((1, source.channels, 1, 1), np.uint8))
    return sums


def renamed(members: Mapping[str, bytes], *changes: tuple[str, str]) -> dict[str, bytes]:
    for old, new in changes:
        members = {re.sub(old, new, name): blob for name, blob in members.items()}
    return dict(members)


def flat(*splits: str, each: int = 3) -> dict[str, bytes]:
    """Images directly in folders, cats and dogs by turns; every name occurs once."""
    return renamed(class_folders(splits, each=each), (r"(\w+)/(cat|dog)/(\d+)", r"\1/\1-\2-\3"))


def rows(members: Mapping[str, bytes], line: str = "{name},{label}", header: str = "filename,label") -> bytes:
    lines = [
        line.format(name=name.rpartition("/")[2], path=name, stem=Path(name).stem, label=_label(name))
        for name in members
    ]
    return "\n".join(([header] if header else []) + lines).encode()


def _label(name: str) -> str:
    return "cat" if "cat" in name else "dog"


ONE = class_folders(("train/", "test/"))
TEN = class_folders(("",), each=10)
THREE = flat("train/", "dev/", "test/")
TINY = "`train/cat/images/a.png`, `val/images/a.png`, `val/val_annotations.txt` (Tiny ImageNet)"
SIX = class_folders(("",), each=6)
LOOSE = renamed(TEN, (r"(\w+)/(\d+)", r"images/\1-\2"))


def listed(last: bool) -> bytes:
    """Paths without suffix: the first or the last three images of each class."""
    return b"\n".join(name[:-4].encode() for name in SIX if (int(name[4]) >= 3) == last)


def usage(members: Mapping[str, bytes]) -> bytes:
    """A table of images by file, with the column of splits that FER2013 has."""
    said = {"train": "Training", "dev": "PublicTest", "test": "PrivateTest"}
    lines = [f"{name.rpartition('/')[2]},{_label(name)},{said[name.partition('/')[0]]}" for name in members]
    return "\n".join(["image,emotion,Usage", *lines]).encode()


RESPELLED = "`images/a.png`, `labels.csv` with the names in another case or with another suffix (`a.JPG`)"
PARTS = "`cat_train/a.png`, `cat_test/a.png`, and so for `dog`; or `train_cat`, …"
FER = "`images/a.png`, `labels.csv` with a column `Usage` of Training, PublicTest, PrivateTest (FER2013)"
Found = tuple[Mapping[str, list[int]], Mapping[str, int], Mapping[str, int]]
"""Images by split and class, the names of the splits, and what is left out."""

FOLDERS: list[tuple[str, dict[str, bytes], Found | str]] = [
    ("`train/cat/a.png`, `test/cat/a.png`", ONE, (BOTH, {"train": 6, "test": 6}, {})),
    ("`cat/a.png`, `dog/a.png`", TEN, (CARVED, {}, {})),
    (
        "`cat/train/a.png`, `cat/test/a.png`",
        renamed(ONE, (r"(\w+)/(\w+)/", r"\2/\1/")),
        (BOTH, {"train": 6, "test": 6}, {}),
    ),
    (
        PARTS,
        renamed(ONE, (r"(\w+)/(\w+)/", r"\2_\1/")),
        (BOTH, {"train": 6, "test": 6}, {}),
    ),
    (
        "`outer/inner/train/cat/a.png`",
        renamed(ONE, ("^", "outer/inner/")) | {"notes/readme.txt": b"?"},
        (BOTH, {"train": 6, "test": 6}, {}),
    ),
    (
        "`Training/cat/a.png`, `Testing/cat/a.png`",
        class_folders(("Training/", "Testing/")),
        (BOTH, {"Training": 6, "Testing": 6}, {}),
    ),
    (
        "`seg_train/seg_train/cat/a.png`, `seg_test/seg_test/cat/a.png`",
        class_folders(("seg_train/seg_train/", "seg_test/seg_test/")),
        (BOTH, {"seg_train": 6, "seg_test": 6}, {}),
    ),
    (
        "`flowers-train/cat/a.png`, `flowers-test/cat/a.png`",
        class_folders(("flowers-train/", "flowers-test/")),
        (BOTH, {"flowers-train": 6, "flowers-test": 6}, {}),
    ),
    (
        "`train/cat/deep/a.png`, `test/cat/a.png`",
        renamed(ONE, ("train/cat", "train/cat/deep")),
        (BOTH, {"train": 6, "test": 6}, {}),
    ),
    ("`train/cat/a.png`, `val/cat/a.png`", class_folders(("train/", "val/")), (BOTH, {"train": 6, "val": 6}, {})),
    (
        "`train/cat/a.png`, `val/cat/a.png`, `test/cat/a.png`",
        class_folders(("train/", "val/", "test/")),
        (ALL, {"train": 6, "val": 6, "test": 6}, {}),
    ),
    (
        "`train/cat/a.png`, `eval/cat/a.png`, `dev/cat/a.png`",
        class_folders(("train/", "eval/"), each=3) | class_folders(("dev/",), each=2),
        ({**BOTH, "val": [2, 2]}, {"train": 6, "dev": 4, "eval": 6}, {}),
    ),
    (
        "`train/cat/a.png`, `val/cat/a.png`, `dev/cat/a.png`, `test/cat/a.png`",
        class_folders(("train/", "val/", "dev/", "test/")),
        (ALL, {"train": 6, "val": 6, "test": 6}, {"dev": 6}),
    ),
    (
        "`train/cat/a.png`, `test/cat/a.png`, `extra/a.png`",
        ONE | flat("extra/"),
        (BOTH, {"train": 6, "test": 6}, {"extra": 6}),
    ),
    (
        "`train/cat/a.png`, `test/a.png`",
        class_folders(("train/",), each=10) | flat("test/"),
        (CARVED, {"train": 20}, {"test": 6}),
    ),
    (
        "`train/cat/a.png`, `val/a.png`, `val.txt`",
        class_folders(("train/",)) | flat("val/") | {"val.txt": rows(flat("val/"), "{name} {label}", "")},
        (BOTH, {"train": 6, "val": 6}, {}),
    ),
    (
        "`train/a.png`, `test/a.png`, `train.csv`, `test.csv`",
        flat("train/", "test/") | {"train.csv": rows(flat("train/")), "test.csv": rows(flat("test/"))},
        (BOTH, {"train": 6, "test": 6}, {}),
    ),
    ("`images/a.png`, `labels.csv`", LOOSE | {"labels.csv": rows(LOOSE)}, (CARVED, {}, {})),
    (
        RESPELLED,
        LOOSE | {"labels.csv": rows(LOOSE, "{stem}.JPG,{label}")},
        (CARVED, {}, {}),
    ),
    (
        "`images/a.png`, `labels.csv` with a column `split`",
        renamed(THREE, ("^.*/", "images/"))
        | {
            "labels.csv": b"filename,label,split\n"
            + b"\n".join(f"{name.partition('/')[2]},{_label(name)},{name.partition('/')[0]}".encode() for name in THREE)
        },
        (ALL, {"train": 6, "dev": 6, "test": 6}, {}),
    ),
    (
        FER,
        renamed(THREE, ("^.*/", "images/")) | {"labels.csv": usage(THREE)},
        (ALL, {"Training": 6, "PublicTest": 6, "PrivateTest": 6}, {}),
    ),
    (
        "`train/cat/a.png`, `public_test/cat/a.png`, `private_test/cat/a.png`",
        class_folders(("train/", "public_test/", "private_test/")),
        (ALL, {"train": 6, "public_test": 6, "private_test": 6}, {}),
    ),
    (
        "`images/a.png`, `labels.csv` with a column `fold`",
        LOOSE | {"labels.csv": rows(LOOSE, "{name},{label},1", "filename,label,Fold")},
        (CARVED, {}, {"the column 'Fold' of labels.csv": 20}),
    ),
    (
        "`images/a.png`, `labels.csv` with empty labels or `nan`",
        LOOSE
        | {f"images/{at}.png": png() for at in range(3)}
        | {"labels.csv": rows(LOOSE) + b"\n0.png,\n1.png,nan\n2.png,NaN"},
        (CARVED, {}, {"images in labels.csv whose label is empty": 3}),
    ),
    (
        "`cat/a.png`, `dog/a.png`, `list.csv` with a column `split`",
        class_folders(("",), each=6)
        | {
            "list.csv": b"path,label,set\n"
            + b"\n".join(
                f"{name},{int('dog' in name)},{'training' if int(name[4]) < 3 else 'testing'}".encode()
                for name in class_folders(("",), each=6)
            )
        },
        (BOTH, {"training": 6, "testing": 6}, {}),
    ),
    (
        "`cat/a.png`, `dog/a.png`, `train.txt`, `test.txt` of paths (Food-101)",
        renamed(SIX, ("^", "food/images/"))
        | {f"food/meta/{split}.txt": listed(split == "test") for split in ("train", "test")}
        | {"food/meta/classes.txt": b"cat\ndog"},
        (BOTH, {"train": 6, "test": 6}, {}),
    ),
    (
        "`cat/a.png`, `dog/a.png`, `images.txt`, `train_test_split.txt` (CUB-200-2011)",
        renamed(SIX, ("^", "images/"))
        | {
            "images.txt": b"\n".join(f"{at} {name}".encode() for at, name in enumerate(SIX, 1)),
            "train_test_split.txt": b"\n".join(
                f"{at} {int(int(name[4]) < 3)}".encode() for at, name in enumerate(SIX, 1)
            ),
            "image_class_labels.txt": b"\n".join(f"{at} {1 + (at > 6)}".encode() for at in range(1, 13)),
        },
        (BOTH, {"train": 6, "test": 6}, {}),
    ),
    (
        TINY,
        renamed(class_folders(("train/",)), ("(cat|dog)/", r"\1/images/"))
        | renamed(flat("val/", "test/"), ("^(val|test)/", r"\1/images/"))
        | {"val/val_annotations.txt": rows(flat("val/"), "{name}\t{label}\t0\t0\t3\t3", "")},
        (BOTH, {"train": 6, "val": 6}, {"test": 6}),
    ),
    ("`a.png`, or `pictures/a.png`", flat("pictures/"), ({}, {}, {})),
    ("`train/a.png`, `test/a.png`", flat("train/", "test/"), "in 'train' and 'test' are in no class folders"),
    ("`train/a.png`", flat("train/"), "The images in 'train' are in no class folders, and no table"),
    ("`test/cat/a.png`", class_folders(("test/",)), "a folder 'test' but none named 'train'"),
    (
        "`learn/cat/a.png`, `test/cat/a.png`, and so for `dog`",
        class_folders(("learn/", "test/")),
        "a folder 'test' but none named 'train'",
    ),
    (
        "`train/a.png`, `test/a.png`, `car/a.png`",
        flat("train/", "test/", "car/"),
        "The folders 'test' and 'train' are named like splits",
    ),
    (
        "`cars_train/cat/a.png`, `cars_test/cat/a.png`, and so for `pets`",
        class_folders(("cars_train/", "cars_test/", "pets_train/", "pets_test/")),
        "Both 'cars_train' and 'pets_train' are named like the split 'train'",
    ),
    (
        "`train_1/cat/a.png`, `train_2/cat/a.png`",
        class_folders(("train_1/", "train_2/")),
        "Both 'train_1' and 'train_2' are named like the split 'train'",
    ),
    (
        "`part1/a.png`, `part2/a.png`, `labels.csv` with other classes",
        flat("part1/", "part2/") | {"labels.csv": rows(flat("part1/", "part2/"), "{path},{label}")},
        "labels.csv sorts the images into other classes than their folders do",
    ),
]
LAYOUT_OF = {
    "`cat/a.png`, `dog/a.png`": "<class>/<image>",
    "`cat/train/a.png`, `cat/test/a.png`": "<class>/<split>/<image>",
    "`train/cat/a.png`, `val/a.png`, `val.txt`": "<split>/<image> and a table",
    "`train/a.png`, `test/a.png`, `train.csv`, `test.csv`": "<split>/<image> and a table",
    "`images/a.png`, `labels.csv`": "<image> and a table",
    "`images/a.png`, `labels.csv` with a column `split`": "<image> and a table",
    "`cat/a.png`, `dog/a.png`, `list.csv` with a column `split`": "<image> and a table",
    "`cat/a.png`, `dog/a.png`, `train.txt`, `test.txt` of paths (Food-101)": "<image> and a table",
    "`cat/a.png`, `dog/a.png`, `images.txt`, `train_test_split.txt` (CUB-200-2011)": "<image> and a table",
    RESPELLED: "<image> and a table",
    PARTS: "<class>_<split>/<image>",
    FER: "<image> and a table",
    "`images/a.png`, `labels.csv` with a column `fold`": "<image> and a table",
    "`images/a.png`, `labels.csv` with empty labels or `nan`": "<image> and a table",
    TINY: "<split>/<image> and a table",
    "`a.png`, or `pictures/a.png`": "<image>",
}


def compare(source: Source, expected: Found) -> None:
    facts = source.facts(some_sums(source), None)
    counts, splits, left_out = expected
    assert facts.class_counts == counts and facts.splits == splits
    assert {one.what: one.count for one in facts.left_out} == left_out
    assert facts.validation == sum(counts.get("val", []))


def test_read_layout_the_page_has_every_layout_that_is_tried():
    assert table("in the archive | read as") == [row for row, *_ in FOLDERS]
    assert table("in the file | read as") == [row for row, *_ in ARRAYS]


@pytest.mark.parametrize(("row", "members", "expected"), FOLDERS, ids=[row for row, *_ in FOLDERS])
def test_read_layout_reads_each_layout_as_the_page_says(pack_zip, row, members, expected):
    path = pack_zip(members)
    if isinstance(expected, str):
        with pytest.raises(DatasetUnreadable, match=expected) as caught:
            open_folders(path, None)
        assert caught.value.hint
        return
    source = open_folders(path, None)
    compare(source, expected)
    assert source.layout == LAYOUT_OF.get(row, "<split>/<class>/<image>")
    assert source.class_names == (("cat", "dog") if expected[0] else ())
    for split, row_numbers, pixels in source.pieces():
        light = pixels[:, 0, 0, 0] >= 200
        labels = source.labels[split][row_numbers]
        assert not expected[0] or (light == labels).all(), "every image has the label of its class"


X, Y = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4), np.arange(10) % 2
TRAIN = {"x_train": X, "y_train": Y}
ARRAYS: list[tuple[str, dict[str, np.ndarray], Found]] = [
    (
        "`x_train`, `y_train`, `x_test`, `y_test`",
        TRAIN | {"x_test": X[:4], "y_test": Y[:4]},
        ({"train": [5, 5], "test": [2, 2]}, {"x_train": 10, "x_test": 4}, {}),
    ),
    ("`x_train`, `y_train`", TRAIN, ({"train": [4, 5], "test": [1, 0]}, {"x_train": 10}, {})),
    (
        "`x_train`, `y_train`, `x_val`, `y_val`",
        TRAIN | {"x_val": X[:4], "y_val": Y[:4]},
        ({"train": [5, 5], "test": [2, 2]}, {"x_train": 10, "x_val": 4}, {}),
    ),
    (
        "`x_train`, `y_train`, `x_valid`, `y_valid`, `x_test`, `y_test`",
        TRAIN | {"x_valid": X[:2], "y_valid": Y[:2], "x_test": X[:4], "y_test": Y[:4]},
        (
            {"train": [5, 5], "val": [1, 1], "test": [2, 2]},
            {"x_train": 10, "x_valid": 2, "x_test": 4},
            {},
        ),
    ),
    (
        "`x_train`, `y_train`, `x_val`",
        TRAIN | {"x_val": X[:4]},
        ({"train": [4, 5], "test": [1, 0]}, {"x_train": 10}, {"x_val": 4}),
    ),
    (
        "`x_train`, `y_train`, `other`",
        TRAIN | {"other": np.zeros((7, 2))},
        ({"train": [4, 5], "test": [1, 0]}, {"x_train": 10}, {"other": 7}),
    ),
    ("`x`, or `x_train`", {"x": X}, ({}, {}, {})),
]


@pytest.mark.parametrize(("row", "members", "expected"), ARRAYS, ids=[row for row, *_ in ARRAYS])
def test_open_arrays_reads_each_file_as_the_page_says(tmp_path, row, members, expected):
    np.savez(tmp_path / "x.npz", **members)
    source = open_arrays(tmp_path / "x.npz", None)
    compare(source, expected)
    assert source.layout == "arrays"


def facts_of(pack: Callable[[Mapping[str, bytes]], Path], members: Mapping[str, bytes]):
    source = open_folders(pack(members))
    return source.facts(some_sums(source), None)


def test_read_layout_every_image_is_used_or_counted_as_left_out(pack_zip):
    members = (
        class_folders(("w/train/", "w/val/", "w/holdout/", "w/test/"))
        | {"w/preview.png": png(), "w/old/deep/x.png": png(), "w/val/bird/1.png": png()}
        | {"w/train/weights.bin": b"?", "LICENSE": b"?", "w/.cache/a.png": png()}
    )
    facts = facts_of(pack_zip, members)
    images = [name for name in members if name.endswith(".png") and "/." not in name]
    left = {one.what: one.count for one in facts.left_out}
    assert left == {
        "images beside the splits": 1, "old": 1, "val/bird": 1, "holdout": 6, "files that are no images": 1
    }  # fmt: skip
    assert facts.train + facts.test + facts.validation + sum(left.values()) - 1 == len(images)


def test_read_layout_the_list_of_what_is_left_out_is_bounded(pack_zip):
    extra = {f"folder {n:02}/a.png": png() for n in range(30)}
    facts = facts_of(pack_zip, class_folders() | extra)
    assert len(facts.left_out) == 21 and facts.left_out[-1].what == "10 more" and facts.left_out[-1].count == 10


def test_read_layout_a_validation_split_may_lack_a_class(pack_zip):
    members = class_folders() | {"val/dog/1.png": png(value=200)}
    assert facts_of(pack_zip, members).class_counts["val"] == [0, 1]


def test_read_layout_classes_named_like_parts_of_splits_are_classes(pack_zip):
    members = {f"{name}/{n}.png": png() for name in ("train station", "bus station", "test tube") for n in range(10)}
    assert facts_of(pack_zip, members).class_names == ["bus station", "test tube", "train station"]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (renamed(class_folders(("", "test/")), ("^(cat|dog)", r"\1")), "a folder 'test' but none named 'train'"),
        (
            renamed(ONE, (r"(\w+)/(\w+)/", r"\2/\1/")) | {"bird/1.png": png()},
            "The class 'bird' has no folder 'train'",
        ),
        (renamed(ONE, ("cat", "Training"), ("dog", "Testing")), "'Testing' and 'Training' are named like splits"),
    ],
    ids=["train beside test", "a class without splits", "classes named like splits"],
)
def test_read_layout_refuses_what_has_two_meanings(pack_zip, members, said):
    with pytest.raises(DatasetUnreadable, match=said):
        open_folders(pack_zip(members), None)


def kaggle_imagenet() -> dict[str, bytes]:
    """The tree of Kaggle's ImageNet: flat val and test, a solution for val far outside, and lists of numbers."""
    inside = class_folders(("train/",)) | flat("val/", "test/")
    tree = renamed(inside, ("^", "ILSVRC/Data/CLS-LOC/"), ("cat/", "n01/"), ("dog/", "n02/"), (r"\.png", ".JPEG"))
    val = [name for name in flat("val/")]
    solution = "\n".join(
        f"{Path(name).stem},{'n01' if 'cat' in name else 'n02'} 1 2 3 4 n09 5 6 7 8" for name in reversed(val)
    )
    numbers = "\n".join(f"{Path(name).stem} {number}" for number, name in enumerate(val, 1))
    return tree | {
        "LOC_val_solution.csv": b"ImageId,PredictionString\n" + solution.encode(),
        "LOC_sample_submission.csv": b"ImageId,PredictionString\n" + rows(flat("test/"), "{stem},n01 0 0 0 0", ""),
        "ILSVRC/ImageSets/CLS-LOC/val.txt": numbers.encode(),
        "ILSVRC/Annotations/CLS-LOC/val/a.xml": b"?",
    }


def test_read_layout_names_that_differ_in_case_or_suffix_are_counted(pack_zip):
    facts = facts_of(pack_zip, LOOSE | {"labels.csv": rows(LOOSE, "Images/{stem}.JPEG,{label}")})
    assert facts.respelled == 20 and next(iter(facts.respelled_names.items())) == (
        "Images/cat-0.JPEG",
        "images/cat-0.png",
    )
    (warning,) = (one for one in dataset_warnings(facts) if one.code == "file_names_differ")
    assert "20 names" in warning.message and "Images/cat-0.JPEG is images/cat-0.png, " in warning.message
    split = {f"{name}.txt": listed(name == "test").replace(b"cat/", b"Cat/") for name in ("train", "test")}
    compare(open_folders(pack_zip(renamed(SIX, ("(.*)/", r"\1/\1-")) | {
        name: blob.replace(b"Cat/", b"Cat/cat-").replace(b"dog/", b"dog/dog-") for name, blob in split.items()
    })), (BOTH, {"train": 6, "test": 6}, {}))  # fmt: skip


def test_read_layout_folders_of_class_and_split_need_all_classes(pack_zip):
    whole = renamed(class_folders(("train/", "val/", "test/")), (r"(\w+)/(\w+)/", r"w/\1-\2/"))
    compare(open_folders(pack_zip(whole)), (ALL, {"train": 6, "val": 6, "test": 6}, {}))
    for absent, said in (("test-dog", "dog"), ("train-dog", "The class 'dog' has no folder 'train'")):
        with pytest.raises(DatasetUnreadable, match=said):
            open_folders(pack_zip({name: blob for name, blob in whole.items() if absent not in name}))


def test_in_order_whole_numbers_are_sorted_by_value():
    assert in_order(["10.0", "2.0", "0.0"]) == ["0.0", "2.0", "10.0"]
    assert in_order(["10.5", "2.0"]) == ["10.5", "2.0"]


def test_read_layout_imagenet_as_kaggle_has_it(pack):
    source = open_folders(pack(kaggle_imagenet()), None)
    compare(source, (BOTH, {"train": 6, "val": 6}, {"test": 6}))
    assert source.class_names == ("n01", "n02") and source.layout == "<split>/<image> and a table"
    for split, row_numbers, pixels in source.pieces():
        assert ((pixels[:, 0, 0, 0] >= 200) == source.labels[split][row_numbers]).all()


def test_read_layout_numbers_of_classes_in_imagenets_list(pack_zip):
    members = class_folders(("train/",)) | flat("val/")
    listed = rows(flat("val/"), "{name} {label}", "").replace(b" cat", b" 0").replace(b" dog", b" 1")
    compare(open_folders(pack_zip(members | {"val.txt": listed}), None), (BOTH, {"train": 6, "val": 6}, {}))


def test_read_layout_the_real_flowers_are_read_as_before():
    path = Path(__file__).parents[4] / "shared" / "data" / "flowers128.zip"
    if not path.exists():
        pytest.skip(f"there is no {path.name} beside the repository")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    source = open_folders(path, None)
    images = [name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    assert sum(map(len, source.labels.values())) == len(images) and not source.left_out
    assert len(source.class_names) == 5 and set(source.splits) == {"train", "test"}


def test_read_layout_lists_that_contradict_each_other_or_name_few_images_are_left_out(pack):
    for name, lists, why in (
        ("test.txt", {"train.txt": listed(False), "test.txt": listed(True) + b"\ncat/0"}, "in another split"),
        ("train.txt and test.txt", {"train.txt": b"cat/0\ndog/0", "test.txt": b"cat/1"}, "they name 3 of 12 images"),
        ("train.txt", {"train.txt": listed(False) + b"\n0", "test.txt": listed(True)}, "which stands for"),
    ):
        source = open_folders(pack(SIX | lists), None)
        assert source.layout == "<class>/<image>" and source.test_carved
        assert [one.what for one in source.left_out] == [name] and why in source.left_out[0].why


def test_read_layout_folders_inside_of_each_class_are_listed(pack):
    masks = renamed(class_folders(("",)), ("(cat|dog)/", r"\1/images/")) | renamed(
        class_folders(("",)), ("(cat|dog)/", r"\1/masks/")
    )
    assert open_folders(pack(masks), None).repeated == ["images", "masks"]
    assert open_folders(pack(renamed(ONE, ("/(cat|dog)/", r"/\1/a/"))), None).repeated == [], "one is no choice"
    assert open_folders(pack(masks | {"cat/more/0.png": png()}), None).repeated == []


def test_read_layout_without_labels_lists_what_may_hold_them(pack):
    notes = {"labels.csv": b"photo,kind,note\n1,cat,x", "a.json": b"{}", "b.json": b"{}", "readme.txt": b"?"}
    notes |= {"latin.csv": "filename,label\n0.png,B\u00e4r".encode("latin-1")}
    source = open_folders(pack(flat("pictures/") | notes), None)
    assert source.class_names == ()
    assert {one.what: one.count for one in source.left_out} == {"labels.csv": 1, "latin.csv": 1, ".json files": 2}


def test_read_layout_classes_by_folder_keep_the_order_of_folders_beside_a_table(pack):
    members = {f"{name}/{name}-{at}.png": png(value=at) for name in ("1", "2", "10") for at in range(6)}
    table = "path,split\n" + "\n".join(f"{name},{'test' if name[-5] > '3' else 'train'}" for name in members)
    source = open_folders(pack(members | {"list.csv": table.encode()}), None)
    assert source.class_names == ("1", "10", "2") and not source.test_carved
