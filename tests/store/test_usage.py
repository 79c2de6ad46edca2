from pathlib import Path

from store.blobs import BlobStore
from store.usage import Usage, measured, usage


def test_files_are_counted_by_kind(tmp_path: Path):
    files, cache = BlobStore(tmp_path / "files"), tmp_path / "cache"
    sha256 = files.put_stream([b"1234"]).sha256
    files.put_stream([b"12345"])
    files.throw_away(sha256, untouched_since=files.now())
    (cache / "digits").mkdir(parents=True)
    (cache / "digits" / "pixels.npy").write_bytes(b"123")
    (cache / "digits.lock").touch()
    nothing = Usage(0, 0)
    assert usage(files, cache) == {
        "blobs": Usage(1, 5),
        "checkpoints": nothing,
        "logs": nothing,
        "uploads": nothing,
        "trash": Usage(1, 4),
        "cache": Usage(2, 3),
    }


def test_a_file_is_measured_as_a_folder_of_one(tmp_path: Path):
    (tmp_path / "one").write_bytes(b"12")
    assert measured(tmp_path / "one") == measured(tmp_path) == Usage(1, 2)
