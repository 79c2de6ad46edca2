"""Pictures that are decoded as they are needed are those of the stored data set; and so are views and students."""

import errno
import io
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from base.data_cache import STREAMED
from base.errors import DatasetUnreadable, StorageFull
from base.warning import WarningItem
from kdcore.data import Room, decoding, load, load_unlabelled, reading_ahead, streaming
from kdcore.data.forms import open_file
from kdcore.data.images import Data, Images, TrainingSet
from kdcore.data.streaming import Streamed, kept
from kdcore.data.views import Views
from kdcore.spec import CropFlip, Dataset, Training
from tests.kdcore.engine import write_arrays, write_pool

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = None

SIDE = 24
"""Larger than what the pictures take as files, which is what a copy of them needs."""


def picture(number: int) -> bytes:
    """Two colours that no other picture has, in a place of its own."""
    pixels = np.full((SIDE, SIDE, 3), number, np.uint8)
    pixels[number % SIDE, :, 0], pixels[:, number % 7, 1] = 255 - number, 3 * number
    blob = io.BytesIO()
    Image.fromarray(pixels).save(blob, "PNG")
    return blob.getvalue()


NAMES = [f"{split}/{name}/{n}.png" for split in ("train", "test") for n in range(12) for name in ("cat", "dog")]
MEMBERS = {name: picture(number) for number, name in enumerate(NAMES)}
DECODED = len(NAMES) * 3 * SIDE * SIDE


def zipped(path: Path, how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, blob in MEMBERS.items():
            archive.writestr(name, blob)


def tarred(path: Path, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, blob in MEMBERS.items():
            member = tarfile.TarInfo(name)
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))


def as_arrays(save=np.savez, transposed: bool = False):
    def write(path: Path) -> None:
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(blob))) for blob in MEMBERS.values()])
        labels = np.arange(len(pixels)) % 2
        if transposed:
            pixels = pixels.transpose(0, 3, 1, 2)
        with path.open("wb") as file:
            save(file, x_train=pixels[:24], y_train=labels[:24], x_test=pixels[24:], y_test=labels[24:])

    return write


def as_table(path: Path) -> None:
    if pyarrow is None:
        pytest.skip("pyarrow, the extra `parquet`, is not installed")
    images = [{"bytes": blob, "path": name} for name, blob in MEMBERS.items()]
    labels = [number % 2 for number in range(len(images))]
    parquet.write_table(pyarrow.table({"image": images, "label": labels}), path, row_group_size=7)


IN_PLACE = {
    "zip": zipped,
    "stored zip": lambda path: zipped(path, zipfile.ZIP_STORED),
    "tar": tarred,
    "arrays": as_arrays(),
    "arrays, channels first": as_arrays(transposed=True),
}
COPIED = {
    "tar.gz": lambda path: tarred(path, "w:gz"),
    "parquet": as_table,
    "zip of another compression": lambda path: zipped(path, zipfile.ZIP_BZIP2),
}
FORMS = IN_PLACE | COPIED


@pytest.fixture
def nothing_in_memory(monkeypatch):
    monkeypatch.setattr(streaming, "RESIDENT_BYTES", 0)


def read(path: Path, cache: Path, max_bytes: int | None = None, **options) -> tuple[Data, list[WarningItem]]:
    warnings: list[WarningItem] = []
    dataset = Dataset(source=f"file:{path}", **options)
    return load(dataset, path, cache, Room(max_bytes, warnings.append)), warnings


def alike(one: Data, other: Data) -> bool:
    pairs = [(one.train, other.train), (one.test, other.test)]
    return one.facts == other.facts and all(
        torch.equal(a.pixels[:], b.pixels[:]) and torch.equal(a.labels, b.labels) for a, b in pairs
    )


@pytest.mark.parametrize("max_bytes", [None, 0, DECODED - 1], ids=["stored", "streamed", "in memory"])
def test_room_hears_of_every_image_that_is_decoded(max_bytes, tmp_path, monkeypatch):
    """A job that decodes for hours is no job that hangs."""
    if max_bytes == 0:
        monkeypatch.setattr(streaming, "RESIDENT_BYTES", 0)
    path = tmp_path / "data"
    zipped(path)
    counted: list[tuple[int, int]] = []
    room = Room(max_bytes, on_progress=lambda done, total: counted.append((done, total)))
    load(Dataset(source=f"file:{path}"), path, tmp_path / "cache", room)
    assert counted[-1] == (len(NAMES), len(NAMES))
    assert [done for done, _ in counted] == sorted({done for done, _ in counted})


@pytest.mark.parametrize(
    "options",
    [{}, {"image_size": 16, "limit": 11}, {"channels": 1, "class_names": ["one", "two"]}],
    ids=["as it is", "resized and limited", "converted and renamed"],
)
@pytest.mark.parametrize("form", FORMS)
def test_kept_streamed_pixels_labels_and_facts_are_those_of_the_stored_set(form, options, tmp_path, nothing_in_memory):
    path = tmp_path / "data"
    FORMS[form](path)
    stored, none = read(path, tmp_path / "stored", **options)
    streamed, [warning] = read(path, tmp_path / "streamed", max_bytes=(10_000 if form in COPIED else 0), **options)
    assert isinstance(stored.train.pixels, Tensor) and isinstance(streamed.train.pixels, Streamed)
    assert not none and alike(stored, streamed)
    [entry] = (tmp_path / "streamed").glob(f"*{STREAMED}")
    assert bool((entry / "pictures").stat().st_size) == (form in COPIED)
    assert f"each epoch decodes {len(stored.train)} pictures again" in warning.message
    assert warning.pointer == "/dataset" and "DISTILLERY_CACHE_MAX_BYTES" in warning.hint
    again, [same_warning] = read(path, tmp_path / "streamed", max_bytes=(10_000 if form in COPIED else 0), **options)
    assert alike(again, streamed) and same_warning == warning


def test_kept_more_room_stores_what_was_streamed(tmp_path, nothing_in_memory):
    zipped(tmp_path / "data")
    streamed, _ = read(tmp_path / "data", tmp_path / "cache", max_bytes=DECODED - 1)
    stored, warnings = read(tmp_path / "data", tmp_path / "cache", max_bytes=DECODED)
    assert isinstance(streamed.train.pixels, Streamed) and isinstance(stored.train.pixels, Tensor)
    assert alike(streamed, stored) and not warnings
    # What is stored is used, whatever the room.
    assert isinstance(read(tmp_path / "data", tmp_path / "cache", max_bytes=0)[0].train.pixels, Tensor)


def test_kept_a_small_set_without_room_is_decoded_into_memory(tmp_path):
    as_arrays(np.savez_compressed)(tmp_path / "data")
    stored, _ = read(tmp_path / "data", tmp_path / "stored")
    held, [warning] = read(tmp_path / "data", tmp_path / "none", max_bytes=0)
    assert isinstance(held.train.pixels, Tensor) and alike(stored, held)
    assert warning.message == (
        f"the decoded pictures take {DECODED:,} bytes, and the cache of this host may hold 0: each attempt at the job "
        "decodes all of them again, into memory"
    )
    assert not list((tmp_path / "none").iterdir())


def test_kept_a_full_disk_is_room_too(tmp_path, monkeypatch):
    zipped(tmp_path / "data")
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    _, [warning] = read(tmp_path / "data", tmp_path / "cache", max_bytes=DECODED)
    assert "its disk has 1,000 bytes free" in warning.message and warning.hint.startswith("free disk space")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (as_arrays(np.savez_compressed), "this form is read as a whole"),
        (COPIED["tar.gz"], "too little even for the pictures as files"),
    ],
    ids=["compressed arrays", "tar.gz"],
)
def test_kept_a_form_that_fits_nowhere_is_refused_with_sizes_and_setting(write, said, tmp_path, nothing_in_memory):
    write(tmp_path / "data")
    with pytest.raises(DatasetUnreadable, match=said) as refused:
        read(tmp_path / "data", tmp_path / "cache", max_bytes=100)
    assert f"take {DECODED:,} bytes, and the cache of this host may hold 100" in str(refused.value)
    assert f"Set DISTILLERY_CACHE_MAX_BYTES to {DECODED:,} or more" in refused.value.hint
    assert not list((tmp_path / "cache").glob(f"*{STREAMED}"))


def test_kept_a_built_in_set_that_fits_nowhere_is_refused(tmp_path, nothing_in_memory):
    zipped(tmp_path / "data")
    with pytest.raises(DatasetUnreadable, match="this form is read as a whole"):
        kept("name", None, tmp_path, lambda: open_file(tmp_path / "data"), Room(0))


def test_kept_a_form_that_is_read_as_a_whole_waits_for_a_full_disk(tmp_path, nothing_in_memory, monkeypatch):
    as_arrays(np.savez_compressed)(tmp_path / "data")
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decoding.os, "posix_fallocate", full, raising=False)
    with pytest.raises(StorageFull, match="No space left"):
        read(tmp_path / "data", tmp_path / "cache", max_bytes=DECODED)


@pytest.mark.parametrize("form", ["zip", "tar", "arrays"])
def test_reader_a_file_that_has_changed_is_an_error(form, tmp_path, nothing_in_memory):
    path = tmp_path / "data"
    FORMS[form](path)
    data, _ = read(path, tmp_path / "cache", max_bytes=0)
    place = data.train.pixels._places[5]
    changed = bytearray(path.read_bytes())
    changed[place[0] + place[1] // 2] ^= 1
    path.write_bytes(changed)
    data.train.pixels.index_select(0, torch.tensor([4, 6]))
    with pytest.raises(DatasetUnreadable, match=rf"has changed since it was read first: the {place[2]:,} bytes at"):
        data.train.pixels.index_select(0, torch.tensor([4, 5]))
    path.write_bytes(b"")
    with pytest.raises(DatasetUnreadable, match="has changed"):
        data.test.pixels[:3]


@pytest.fixture
def streamed(tmp_path, nothing_in_memory) -> Images:
    tarred(tmp_path / "data")
    return read(tmp_path / "data", tmp_path / "cache", max_bytes=0)[0].train


def decoded_rows(images: Images, monkeypatch) -> list[int]:
    """The rows that are decoded from now on."""
    rows, reader = [], images.pixels._reader
    known = {int(place[0]): row for row, place in enumerate(images.pixels._places)}
    real = reader.pixels
    monkeypatch.setattr(reader, "pixels", lambda place: rows.append(known[place[0]]) or real(place))
    return rows


def test_streamed_expected_rows_are_decoded_once_and_ahead(streamed, monkeypatch):
    whole = streamed.pixels[:]
    rows = decoded_rows(streamed, monkeypatch)
    epoch = torch.tensor([3, 1, 20, 7, 5, 11])
    streamed.expect(epoch)
    assert torch.equal(streamed.pixels.index_select(0, epoch[:2]), whole[epoch[:2]])
    # Other rows in between do not disturb what is decoded ahead.
    assert torch.equal(streamed.pixels.index_select(0, torch.tensor([0, 3])), whole[[0, 3]])
    assert torch.equal(streamed.pixels.index_select(0, epoch[2:]), whole[epoch[2:]])
    assert sorted(rows) == sorted([*epoch.tolist(), 0, 3])
    # Beyond what was expected rows are decoded as they are asked for.
    assert torch.equal(streamed.pixels.index_select(0, epoch[:1]), whole[epoch[:1]])


def test_streamed_rows_are_right_when_another_thread_takes_the_next_ones(streamed):
    """As a teacher that runs ahead may."""
    pixels, count = streamed.pixels, len(streamed)
    right = pixels.index_select(0, torch.arange(count))
    pixels.expect(torch.arange(count))
    batches = torch.arange(count).split(2)
    with ThreadPoolExecutor(2) as pool:
        both = [[pool.submit(pixels.index_select, 0, rows) for _ in range(2)] for rows in batches]
        for rows, taken in zip(batches, both, strict=True):
            assert all(torch.equal(one.result(), right[rows]) for one in taken)


def test_reader_decodes_no_more_pixels_at_once_than_its_budget(tmp_path, nothing_in_memory, monkeypatch):
    monkeypatch.setattr(reading_ahead, "free_cores", lambda: 4)
    monkeypatch.setattr(reading_ahead, "_BATCH", 1)
    monkeypatch.setattr(streaming, "PIXELS_AT_ONCE", 2 * SIDE * SIDE)
    zipped(tmp_path / "data")
    pixels = read(tmp_path / "data", tmp_path / "cache", max_bytes=0)[0].train.pixels
    real, lock, at_once = streaming.image_files.decode, threading.Lock(), [0, 0]

    def counted(*arguments):
        with lock:
            at_once[0] += 1
            at_once[1] = max(at_once)
        try:
            return real(*arguments)
        finally:
            with lock:
                at_once[0] -= 1

    monkeypatch.setattr(streaming.image_files, "decode", counted)
    assert len(pixels[:]) == 24 and 1 <= at_once[1] <= 2


def test_streamed_slices_in_order_are_decoded_once(streamed, monkeypatch):
    rows = decoded_rows(streamed, monkeypatch)
    parts = [streamed.pixels[at : at + 7] for at in range(0, len(streamed), 7)]
    assert sorted(rows) == list(range(24))
    assert torch.equal(torch.cat(parts), streamed.pixels[:])
    assert torch.equal(streamed.pixels[2:20:3], streamed.pixels[:][2:20:3])
    assert streamed.pixels[5:5].shape == (0, 3, SIDE, SIDE)


def test_streamed_no_more_than_its_bytes_are_decoded_ahead(streamed, monkeypatch):
    rows = decoded_rows(streamed, monkeypatch)
    monkeypatch.setattr(reading_ahead, "_BATCH", 2)
    monkeypatch.setattr(reading_ahead, "_AHEAD_BYTES", 4 * 3 * SIDE * SIDE)
    streamed.expect(torch.arange(24))
    streamed.pixels.index_select(0, torch.arange(2))
    assert len(rows) <= 8


def test_streamed_views_and_held_out_images_are_those_of_the_stored_set(streamed, tmp_path):
    stored = read(tmp_path / "data", tmp_path / "stored")[0].train
    views, index = Views(CropFlip(padding=2), None, 2), torch.tensor([9, 0, 23, 4])
    one, other = (views.batch(images, index, seed=3, epoch=1) for images in (stored, streamed))
    assert torch.equal(one.inputs, other.inputs) and torch.equal(one.labels, other.labels)
    recipe = Training(epochs=1, batch_size=4, validation_fraction=0.25)
    sets = [TrainingSet.of(images, recipe) for images in (stored, streamed)]
    assert isinstance(sets[1].held_out.pixels, Streamed)
    assert torch.equal(sets[0].held_out.pixels[:], sets[1].held_out.pixels[:])
    assert torch.equal(sets[0].held_out.labels, sets[1].held_out.labels)


def test_stacked_streamed_rows_beside_a_tensor(streamed, monkeypatch):
    beside = Images(torch.full((3, 3, SIDE, SIDE), 7, dtype=torch.uint8), torch.full((3,), -1))
    for joined, first in ((beside.joined(streamed), 3), (streamed.joined(beside), 0)):
        whole = torch.empty(27, 3, SIDE, SIDE, dtype=torch.uint8)
        whole[first : first + 24] = streamed.pixels[:]
        whole[torch.arange(27) - first < 0] = 7
        whole[torch.arange(27) - first > 23] = 7
        rows = torch.randperm(27, generator=torch.Generator().manual_seed(0))
        joined.expect(rows)
        decoded = decoded_rows(streamed, monkeypatch)
        assert torch.equal(torch.cat([joined.pixels.index_select(0, part) for part in rows.split(5)]), whole[rows])
        assert sorted(decoded) == list(range(24))
        assert torch.equal(joined.pixels[4:9], whole[4:9])
        monkeypatch.undo()


def test_streamed_to_another_device_decodes_on_the_host(streamed):
    # `meta` stands for a GPU: its rows have a shape and no content.
    there = Images(streamed.pixels.to("meta"), streamed.labels)
    assert there.pixels.device.type == "meta" and there.pixels[:2].device.type == "meta"
    assert there.part(torch.tensor([1, 2])).pixels.shape == (2, 3, SIDE, SIDE)
    beside = Images(torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8), torch.full((2,), -1))
    stacked = streamed.joined(beside).pixels.to("meta")
    assert stacked.device.type == "meta" and stacked.shape[0] == 26


def test_load_unlabelled_images_are_streamed_too(tmp_path, nothing_in_memory):
    data, pool = write_arrays(tmp_path / "data.npz"), write_pool(tmp_path / "pool.npz")
    like, _ = read(data, tmp_path / "cache")
    warnings: list[WarningItem] = []
    room = Room(0, warnings.append, "/unlabelled")
    source = Dataset(source=f"file:{pool}")
    images = load_unlabelled(source, pool, tmp_path / "cache", like.facts, room)
    assert isinstance(images.pixels, Streamed) and [one.pointer for one in warnings] == ["/unlabelled"]
    assert torch.equal(images.pixels[:], load_unlabelled(source, pool, tmp_path / "whole", like.facts).pixels)
