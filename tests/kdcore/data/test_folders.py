import io
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from base.errors import DatasetUnreadable
from base.zip_files import read_member
from kdcore.data.archive import Limits
from kdcore.data.decoding import Source
from kdcore.data.folders import open_folders
from kdcore.spec import DataOptions
from tests.kdcore.data.making import class_folders, png

BROKEN = {"empty": b"", "text": b"not a picture", "cut": png(40, 40)[:-30]}


def values(source: Source, split: str) -> list[int]:
    """The first channel's first pixel of every image, by row."""
    found = np.full(len(source.labels[split]), -1)
    for name, rows, pixels in source.pieces():
        if name == split:
            found[rows] = pixels[:, 0, 0, 0]
    return found.tolist()


def test_open_folders_train_and_test(pack):
    source = open_folders(pack(class_folders()), None)
    assert source.class_names == ("cat", "dog") and not source.test_carved
    assert (source.channels, source.height, source.width) == (3, 4, 4)
    assert source.labels["train"].tolist() == source.labels["test"].tolist() == [0, 0, 0, 1, 1, 1]
    assert values(source, "train") == values(source, "test") == [10, 11, 12, 200, 201, 202]


def test_open_folders_rows_do_not_depend_on_the_archives_order(pack):
    backwards = dict(reversed(class_folders().items()))
    assert values(open_folders(pack(backwards), None), "train") == [10, 11, 12, 200, 201, 202]


def test_open_folders_class_folders_alone_get_a_tenth_carved(pack):
    source = open_folders(pack(class_folders(("",), each=20)), None)
    assert source.test_carved
    assert np.bincount(source.labels["train"]).tolist() == [18, 18]
    assert np.bincount(source.labels["test"]).tolist() == [2, 2]
    train, test = values(source, "train"), values(source, "test")
    assert sorted(train + test) == [*range(10, 30), *range(200, 220)]
    assert all((value >= 200) == bool(label) for value, label in zip(test, source.labels["test"], strict=True))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation", "Test", "VAL"])
def test_open_folders_what_a_test_folder_may_be_called(pack_zip, name):
    source = open_folders(pack_zip(class_folders(("Train/", f"{name}/"))), None)
    assert not source.test_carved and len(source.labels["test"]) == 6


def test_open_folders_of_test_and_val_test_is_taken(pack_zip):
    members = class_folders(("train/", "val/")) | class_folders(("test/",), each=1)
    assert len(open_folders(pack_zip(members), None).labels["test"]) == 2


def test_open_folders_unlabelled_test_images_are_left_alone(pack_zip):
    members = class_folders(("train/", "val/")) | {"test/1.png": png(), "test/2.png": png()}
    assert len(open_folders(pack_zip(members), None).labels["test"]) == 6


def test_open_folders_a_wrapping_folder_and_notes_are_looked_through(pack):
    members = {f"flowers/{name}": blob for name, blob in class_folders().items()}
    notes = {"flowers/README.md": b"?", "flowers/train/labels.csv": b"?", "flowers/LICENSE": b"?", "LICENSE": b"?"}
    source = open_folders(pack(members | notes), None)
    assert source.class_names == ("cat", "dog") and values(source, "test")[0] == 10


def test_open_folders_wrapped_class_folders_alone(pack_zip):
    members = {f"pets/{name}": blob for name, blob in class_folders(("",), each=5).items()}
    assert open_folders(pack_zip(members), None).class_names == ("cat", "dog")


def test_open_folders_images_may_lie_deeper(pack_zip):
    members = {name.replace("/cat/", "/cat/images/"): blob for name, blob in class_folders().items()}
    assert open_folders(pack_zip(members), None).class_names == ("cat", "dog")


def test_open_folders_a_class_may_be_called_train(pack_zip):
    members = {f"{name}/{n}.png": png() for name in ("train", "car", "bus") for n in range(5)}
    assert open_folders(pack_zip(members), None).class_names == ("bus", "car", "train")


def test_open_folders_classes_are_numbered_by_sorted_name(pack_zip):
    members = {f"{split}/{name}/1.png": png() for split in ("train", "test") for name in ("10", "9", "B", "a")}
    assert open_folders(pack_zip(members), None).class_names == ("10", "9", "B", "a")


def test_open_folders_all_grey_is_one_channel_and_one_colour_image_makes_three(pack_zip):
    grey = class_folders(mode="L")
    assert open_folders(pack_zip(grey), None).channels == 1
    assert open_folders(pack_zip(grey | {"test/cat/0.png": png()}), None).channels == 3


@pytest.mark.parametrize("folder", ["", "pictures/"])
def test_open_folders_pictures_side_by_side_have_no_labels(pack, folder):
    members = {f"{folder}{name}.png": png(value=value) for name, value in (("b", 2), ("c", 3), ("a", 1))}
    source = open_folders(pack(members | {f"{folder}notes.txt": b"?", "README.md": b"?"}), None)
    assert source.class_names == () and source.labels["train"].tolist() == [-1] * 3
    assert len(source.labels["test"]) == 0 and not source.test_carved
    assert values(source, "train") == [1, 2, 3]


def test_open_folders_a_broken_picture_without_a_label_is_named(pack):
    with pytest.raises(DatasetUnreadable, match=r"pictures/2\.png"):
        open_folders(pack({"pictures/1.png": png(), "pictures/2.png": b"not a picture"}), None)


def test_open_folders_pictures_without_labels_may_differ_in_size_where_one_is_asked_for(pack_zip):
    path = pack_zip({"1.png": png(), "2.png": png(width=6)})
    with pytest.raises(DatasetUnreadable, match="differ in size"):
        open_folders(path, None)
    assert open_folders(path, DataOptions(image_size=4)).width == 4


def test_open_folders_differing_sizes_need_an_image_size(pack):
    path = pack(class_folders() | {"test/dog/9.png": png(width=6)})
    with pytest.raises(DatasetUnreadable, match=r"differ in size: 4x4 \(12 images\), 6x4 \(1 images\)") as caught:
        open_folders(path, None)
    assert "image_size" in str(caught.value.hint)
    source = open_folders(path, DataOptions(image_size=8))
    assert (source.height, source.width) == (8, 8)
    assert {pixels.shape[1:] for _, _, pixels in source.pieces()} == {(3, 8, 8)}


@pytest.mark.parametrize("blob", [b"", b"not a picture", png()[:-30]], ids=["empty", "text", "cut"])
def test_open_folders_a_broken_image_is_named(pack, blob):
    with pytest.raises(DatasetUnreadable, match=r"train/cat/1\.png"):
        for _ in open_folders(pack(class_folders() | {"train/cat/1.png": blob}), None).pieces():
            pass


def test_open_folders_one_broken_jpeg_is_named(pack_zip):
    noise = io.BytesIO()
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(noise, "JPEG")
    path = pack_zip(class_folders(width=40, height=40) | {"test/dog/1.png": noise.getvalue()[:700]})
    with pytest.raises(DatasetUnreadable, match=r"test/dog/1\.png cannot be decoded"):
        list(open_folders(path, None).pieces())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test/bird/1.png": png()}, "The class 'bird' is missing in train"),
        ({"train/bird/1.png": png()}, "The class 'bird' is missing in test"),
        ({"train/stray.png": png()}, "train/stray.png"),
        ({"train/bird/notes.txt": b"?", "train/bird/": b""}, "'bird' in train holds no images"),
    ],
)
def test_open_folders_what_does_not_fit_is_named(pack_zip, change, said):
    with pytest.raises(DatasetUnreadable, match=said):
        open_folders(pack_zip(class_folders() | change), None)


def test_open_folders_a_split_without_images(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, blob in class_folders(("train/",)).items():
            archive.writestr(name, blob)
        archive.mkdir("test")
    with pytest.raises(DatasetUnreadable, match="The test folder holds no images"):
        open_folders(path, None)


def test_open_folders_an_empty_class_folder_in_a_tar(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, blob in class_folders().items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
        empty = tarfile.TarInfo("test/empty")
        empty.type = tarfile.DIRTYPE
        archive.addfile(empty)
    with pytest.raises(DatasetUnreadable, match="'empty' in test holds no images"):
        open_folders(path, None)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({}, "holds no images"),
        ({"readme.txt": b"?"}, "holds no images"),
        ({"1.png": png(), "cat/2.png": png()}, "1.png is in no class folder"),
        ({"x/only/1.png": png(), "x/only/2.png": png()}, "only one class, 'only'"),
        (class_folders(("test/",)), "a folder 'test' but none named 'train'"),
        (class_folders(("",), each=1), "too few to set some aside"),
    ],
    ids=["nothing", "notes", "stray", "one class", "no train", "too few"],
)
def test_open_folders_archives_without_a_data_set(pack_zip, members, said):
    with pytest.raises(DatasetUnreadable, match=said):
        open_folders(pack_zip(members), None)


def test_open_folders_limits_hold_here_too(pack):
    with pytest.raises(DatasetUnreadable, match="more than 3 members"):
        open_folders(pack(class_folders()), None, Limits(members=3))


@pytest.mark.parametrize("forms", [("caf\u00e9", "cafe\u0301"), ("bell", "bell ")], ids=["unicode", "blank"])
def test_open_folders_folders_that_become_one_are_one_class_and_named(pack, forms):
    one, other = forms
    members = {f"{split}/dog/1.png": png(value=200) for split in ("train", "test")}
    members |= {
        f"train/{one}/1.png": png(value=1),
        f"train/{other}/2.png": png(value=2),
        f"test/{other}/3.png": png(value=3),
    }
    source = open_folders(pack(members), None)
    assert source.class_names == tuple(sorted((one, "dog"))) and list(source.merged) == [f"train/{one}"]
    assert sorted(values(source, "train")) == [1, 2, 200] and sorted(values(source, "test")) == [3, 200]


def test_open_folders_ordinary_names_are_not_merged(pack):
    assert open_folders(pack({f"./{name}": blob for name, blob in class_folders().items()}), None).merged == []


def test_open_folders_names_in_another_encoding(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, blob in class_folders().items():
            raw = name.replace("cat", "кот").encode("cp866").decode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(raw)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    source = open_folders(path, DataOptions(encoding="cp866"))
    assert source.class_names == ("dog", "кот") and values(source, "train") == [200, 201, 202, 10, 11, 12]


def test_open_folders_many_broken_files_keep_none_of_their_bytes(pack_zip):
    """What is kept of a file that is no image must not grow with the file. Files that are read ahead do not count: how
    many there are at once depends on the load of the machine."""
    broken = {f"train/cat/{n}.png": bytes([n]) * 200_000 for n in range(60)}
    path = pack_zip({"train/dog/1.png": png()} | broken)
    tracemalloc.start()
    with pytest.raises(DatasetUnreadable, match="is not an image of a known kind") as raised:
        open_folders(path, None)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert raised.value is not None and kept < 5_000_000


def read(path, **given):
    source = open_folders(path, DataOptions.model_validate(given))
    for _ in source.pieces():
        pass
    return source


def test_open_folders_all_broken_pictures_are_named_at_once(pack):
    """Those that a header shows, and those that only the decoding shows."""
    broken = {
        "train/cat/1.png": BROKEN["empty"],
        "test/dog/0.png": BROKEN["cut"],
        "train/dog/2.png": BROKEN["text"],
        "test/cat/2.png": BROKEN["cut"],
    }
    with pytest.raises(DatasetUnreadable) as caught:
        read(pack(class_folders(width=40, height=40) | broken))
    assert str(caught.value).startswith("4 pictures cannot be read.")
    assert all(name in str(caught.value) for name in broken) and "skip_unreadable" in str(caught.value.hint)


def test_open_folders_broken_pictures_that_only_decoding_shows_are_named_at_once(pack_zip):
    broken = {f"train/{name}/{number}.png": BROKEN["cut"] for name in ("cat", "dog") for number in range(12)}
    with pytest.raises(DatasetUnreadable) as caught:
        read(pack_zip(class_folders(each=20, width=40, height=40) | broken))
    assert str(caught.value).startswith("24 pictures cannot be read.") and str(caught.value).endswith("And 4 more.")
    assert str(caught.value).count("cannot be decoded") == 20


@pytest.mark.parametrize("splits", [("train/", "test/"), ("",)], ids=["split", "carved"])
def test_open_folders_skipping_is_reading_the_archive_without_them(pack, splits):
    whole = class_folders(splits, each=20, width=40, height=40)
    broken = {f"{splits[0]}cat/1.png": BROKEN["cut"], f"{splits[0]}dog/7.png": BROKEN["empty"]}
    skipping = read(pack(whole | broken), skip_unreadable=True)
    rows = {split: values(skipping, split) for split in ("train", "test")}
    assert skipping.skipped == list(broken)
    without = read(pack({name: blob for name, blob in whole.items() if name not in broken}))
    assert rows == {split: values(without, split) for split in ("train", "test")}
    assert skipping.labels["train"].tolist() == without.labels["train"].tolist() and not without.skipped


def test_open_folders_skipping_leaves_no_class_empty(pack_zip):
    members = class_folders(each=1) | {"train/cat/0.png": b"?"}
    with pytest.raises(DatasetUnreadable, match="class folder 'cat' in train holds no images"):
        read(pack_zip(members), skip_unreadable=True)


def test_open_folders_skipping_unlabelled_pictures(pack_zip):
    source = read(pack_zip({"1.png": png(value=1), "2.png": b"?", "3.png": png(value=3)}), skip_unreadable=True)
    assert values(source, "train") == [1, 3] and source.skipped == ["2.png"]


def test_open_folders_a_damaged_member_of_a_zip_is_skipped_too(pack_zip):
    """Its bytes differ from their checksum."""
    path = pack_zip(class_folders())
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("train/dog/1.png").header_offset + 30 + len("train/dog/1.png") + 5
    blob = bytearray(path.read_bytes())
    blob[at] ^= 0xFF
    path.write_bytes(blob)
    with pytest.raises(DatasetUnreadable, match=r"train/dog/1\.png cannot be unpacked"):
        read(path)
    assert read(path, skip_unreadable=True).skipped == ["train/dog/1.png"]


def test_open_folders_counts_what_is_peculiar(pack_zip):
    clear = png(mode="RGBA", value=0)
    members = class_folders() | {"train/cat/0.png": clear, "train/cat/1.png": png(mode="L"), "test/dog/0.png": clear}
    source = open_folders(pack_zip(members))
    assert source.pictures == {"colour": 11, "grey": 1, "alpha": 2} and source.pixels_cut == 0


def test_open_folders_grey_pictures_of_16_bits_are_grey(pack_zip):
    from PIL import Image

    def deep(top: int) -> bytes:
        blob = io.BytesIO()
        Image.fromarray(np.array([[0, top], [top // 2, top // 5]], np.uint16)).save(blob, "PNG")
        return blob.getvalue()

    members = {
        f"{split}/{name}/0.png": deep(top) for split in ("train", "test") for name, top in (("a", 500), ("b", 9))
    }
    source = open_folders(pack_zip(members))
    assert source.channels == 1 and source.pictures == {"grey": 4, "sixteen_bit": 4}
    (first, *_) = source.pieces()
    assert first.pixels[0].tolist() == [[[0, 255], [128, 51]]]


def test_open_folders_pictures_turned_upright_have_one_size(pack_zip):
    from PIL import Image

    def phone(sideways: bool) -> bytes:
        exif, blob = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6 if sideways else 1
        Image.new("RGB", (6, 4) if sideways else (4, 6), (90, 90, 90)).save(blob, "JPEG", exif=exif)
        return blob.getvalue()

    members = {
        f"{split}/{name}/{number}.jpg": phone(bool(number))
        for split in ("train", "test") for name in ("a", "b") for number in (0, 1)
    }  # fmt: skip
    path = pack_zip(members)
    with pytest.raises(DatasetUnreadable, match="differ in size"):
        open_folders(path)
    source = read(path, orientation="apply")
    assert (source.height, source.width) == (6, 4) and source.pictures == {"colour": 8, "oriented": 4}


def test_open_folders_a_limit_decodes_no_more_than_that(pack_zip, monkeypatch):
    from kdcore.data import image_files

    decoded = []
    decode = image_files.decode
    monkeypatch.setattr(
        image_files, "decode", lambda blob, name, *how: decoded.append(name) or decode(blob, name, *how)
    )
    source = read(pack_zip(class_folders(each=30)), limit=8)
    assert np.bincount(source.labels["train"]).tolist() == [4, 4] and len(source.labels["test"]) == 60
    assert len(decoded) == 68 and source.pictures["colour"] == 68


def test_open_folders_names_of_a_zip_in_another_encoding(pack_zip):
    members = {name.replace("cat", "\u732b"): blob for name, blob in class_folders().items()}
    path = pack_zip(members)
    raw = path.read_bytes()
    encoded, marked = "\u732b".encode(), "\u732b".encode("cp932") + b"_"
    path.write_bytes(raw.replace(encoded, marked).replace(b"\x00\x08\x08\x00", b"\x00\x00\x08\x00"))
    assert open_folders(path, DataOptions(encoding="cp932")).class_names == ("dog", "\u732b_")


def test_open_folders_stops_where_most_pictures_are_broken(pack):
    """With or without `skip_unreadable`: of a million empty files, a thousand are looked at."""
    members = {f"a/{number}.png": b"" for number in range(30)}
    for options in (DataOptions(), DataOptions(skip_unreadable=True)):
        with pytest.raises(DatasetUnreadable, match=r"10 pictures cannot be read\..*rest behind 10 pictures was not"):
            open_folders(pack(members), options, Limits(broken=10))


def test_open_folders_goes_on_if_most_pictures_are_good(pack):
    members = {**class_folders(each=6), **{f"train/cat/broken{number}.png": b"" for number in range(10)}}
    source = open_folders(pack(members), DataOptions(skip_unreadable=True), Limits(broken=10))
    assert len(source.skipped) == 10 and len(source.labels["train"]) == 12


def test_open_folders_stops_where_nothing_is_a_picture(pack):
    members = {f"a/{number}.bin": b"no picture" for number in range(30)}
    with pytest.raises(DatasetUnreadable, match=r"no images among its first 20 files. a/0*19\.bin is not an image"):
        open_folders(pack(members), None, Limits(no_pictures=20))
    assert open_folders(pack({**members, **class_folders()}), None, Limits(no_pictures=31)).class_names


def test_open_folders_bounds_the_pixels_of_all_pictures(pack):
    """Empty pictures: 250 bytes each, and a second of decoding."""
    members = class_folders(width=100, height=100)
    with pytest.raises(DatasetUnreadable, match=r"40,000 pixels or more in .* bytes: it looks like a bomb"):
        open_folders(pack(members), None, Limits(pixels_from=30_000, pixels_a_byte=0))


def test_open_folders_reads_no_large_file_that_does_not_begin_like_a_picture(pack_zip, monkeypatch):
    monkeypatch.setattr("kdcore.data.folders._WHOLE_BYTES", 50)
    monkeypatch.setattr("kdcore.data.archive.read_member", head_only)
    members = {"a/1.png": b"x" * 100, "a/2.png": b"y" * 100}
    with pytest.raises(DatasetUnreadable, match=r"a/1\.png is not an image of a known kind"):
        open_folders(pack_zip(members), None)


def head_only(descriptor, member, most=None):
    assert most == 16, "the file was read"
    return read_member(descriptor, member, most)
