import pickle
import struct
import zlib

import pytest

from base import file_kinds
from base.file_kinds import HEAD_BYTES, is_idx, kind_of, kind_of_members


def crc32c(blob: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in blob:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def tfrecord(content: bytes) -> bytes:
    assert crc32c(b"123456789") == 0xE3069283, "the published check value"
    length = struct.pack("<Q", len(content))
    crc = crc32c(length)
    return length + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF) + content


STARTS = [
    (b"PAR1" + bytes(300), "Parquet"),
    (b"Rar!\x1a\x07\x01\x00", "RAR"),
    (b"Rar!\x1a\x07\x00", "RAR"),
    (b"7z\xbc\xaf\x27\x1c\x00\x04", "7z"),
    (b"\x28\xb5\x2f\xfd\x24", ".zst"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh91AY&SY", "bzip2"),
    (b"\x93NUMPY\x01\x00", "numpy array"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"MATLAB 5.0 MAT-file, Platform: GLNXA64", "MATLAB"),
    (b"MATLAB 7.3 MAT-file, Platform: GLNXA64", "HDF5"),
    (b"\x1c\x00\x00\x00TFL3\x14\x00", "TFLite"),
    (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xff", "ONNX"),
    (b"\x08\x04\x12\x07tf2onnx\x1a\x051.9.3\x42\x04", "ONNX"),
    (b"\x08\x09\x3a\xff\x01", "ONNX"),
    (tfrecord(b"hello"), "TFRecord"),
    (b"ARROW1\x00\x00", "Arrow"),
    (b"label,1x1,1x2\n5,0,0\n", ".csv"),
    ("größe;höhe\n1;2\n".encode(), ".csv"),
    (b"\xff\xd8\xff\xe0", "an image"),
    (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "an image"),
    (pickle.dumps({"a": 1}), "pickle"),
    (pickle.dumps({"a": 1}, 2), "pickle"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "PyTorch"),
    (b"\n<!DOCTYPE html>", "HTML"),
    (b"\xef\xbb\xbf[1, 2]", "JSON"),
    (b'<?xml version="1.0"?><net name="r" version="11">', "OpenVINO"),
    (b'{"metadata": {"total_size": 9}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}', "several files"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (struct.pack(">IIII", 0x803, 4, 28, 28), "idx"),
    (bytes(128) + b"DICM", "DICOM"),
    (b"\x08\x05\x12\x2f\x0a\x0dimage", "Core ML"),
    (b"\x08\x07\x12\xf0\x2e\x0a\x0dimage" + bytes(2000), "Core ML"),
    (b"\x08\x05\x12\x2f\xa2\x06\x0cnotes", "Core ML"),
    (b"\x08\x08\x12\x04RKNN\x3a\xff", "ONNX"),
    (b"\x08\x01\x12\xf3\xb2\x3d\x0a\x9e" + bytes(2000), "SavedModel"),
    (b"\x82\xa6params\x83\xa5stage", "JAX"),
]


@pytest.mark.parametrize(("head", "words"), STARTS, ids=[f"{words}-{at}" for at, (_, words) in enumerate(STARTS)])
def test_kind_of_names_a_file_by_its_first_bytes(head, words):
    kind = kind_of(head[:HEAD_BYTES])
    assert kind is not None and words in kind.words


@pytest.mark.parametrize(
    "head",
    [b"PK\x03\x04", b"\x1f\x8b\x08", b"", b"\x00", bytes(512), bytes(range(256)), b"just some words", b"\x08", b"\x80"],
)
def test_kind_of_says_nothing_about_archives_and_unknown_bytes(head):
    assert kind_of(head) is None


def test_kind_of_survives_any_start_of_a_known_file():
    for head, _ in STARTS:
        for end in range(len(head)):
            kind_of(head[:end])


def test_is_idx_needs_a_known_type_and_dimensions():
    assert is_idx(b"\0\0\x08\x01\0\0\0\x09") and is_idx(b"\0\0\x0d\x03" + bytes(12))
    assert not is_idx(bytes(16)) and not is_idx(b"\0\0\x08\x03") and not is_idx(b"\0\0\x08\x05" + bytes(20))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["m/data.pkl", "m/constants.pkl"], "TorchScript"),
        (["m/archive_format", "m/data.pkl"], "torch.export"),
        (["m/data.pkl", "m/data/0"], "PyTorch checkpoint"),
        (["m/saved_model.pb", "m/variables/variables.index"], "SavedModel"),
        (["config.json", "model.weights.h5"], "Keras"),
        (["[Content_Types].xml", "word/document.xml"], "office"),
        (["000.jpg", "000.cls"], "webdataset"),
        (["a/x.npy", "a/y.npy"], "numpy"),
        (["data.MAT"], "MATLAB"),
        (["x.tfrecord"], "TFRecord"),
        (["inner.tar.gz"], "archive of archives"),
    ],
)
def test_kind_of_members_names_an_archive_by_what_is_in_it(names, words):
    kind = kind_of_members(names)
    assert kind is not None and words in kind.words


def test_kind_of_members_says_nothing_about_pictures():
    assert kind_of_members(["train/cat/1.png", "train/dog/2.jpg", "notes.txt"]) is None


def test_every_kind_with_advice_says_it_in_sentences():
    kinds = [value for value in vars(file_kinds).values() if isinstance(value, file_kinds.FileKind)]
    assert len(kinds) > 20
    for kind in kinds:
        assert kind.words and "weights_only" not in "".join(kind)
        assert kind.as_data == "" or (kind.as_data[0].isupper() and kind.as_data.endswith("."))
        assert not kind.as_model.endswith(".")


def test_checksums_of_other_files_are_no_tfrecord():
    blob = struct.pack("<QI", 5, zlib.crc32(struct.pack("<Q", 5))) + b"hello"
    assert kind_of(blob) is None
